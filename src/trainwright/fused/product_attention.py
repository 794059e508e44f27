"""Causal attention of short sequences in bf16, by batched products, on CPUs that multiply bf16 without tiles (AMX).

torch's kernel for CPUs goes block by block through products too small for such a processor: at 256 tokens these take 1.4 to
1.5 times as long as a few large ones with the scores of a block of queries between them. What is rounded is the same: scores,
softmax and the gradient in the scores are fp32 and rounded for the products that follow. For backward q, k, v and the rounded
softmax are kept, 2 bytes a score: to make it again would take a third of backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trainwright.fused.linear import widens
from trainwright.other_machines import planned_for
from trainwright.torch_private import cpu_bf16_is_fast, cpu_has_tiles, softmax, softmax_backward

SERVES = cpu_bf16_is_fast() and not cpu_has_tiles()
"""Whether this processor is one of those."""
SHORTEST, LONGEST = 64, 512
"""Tokens: below there is nothing to win, from 1,024 on torch's kernel is as fast."""
_BLOCK = 128
"""Queries at a time: three quarters of all scores at 256 tokens are made, where half count."""
_ROOM = 1 << 21
"""Scores at a time, unless a single sequence has more: 8 MB, which stay in the cache."""


def by_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention of tensors like these, [B, H, T, E] and twice [B, G, T, E], is better made here on this machine."""
    return (
        SERVES
        and q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and k.shape == v.shape
        and SHORTEST <= q.shape[2] == k.shape[2] <= LONGEST
        and not planned_for()
        and not widens(q)
    )


def product_attention(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B G T E"], v: Float[Tensor, "B G T E"]
) -> Float[Tensor, "B H T E"]:
    """softmax(q kᵀ / sqrt(E)) v, where no query sees ahead; H is a multiple of G."""
    out: Tensor = PRODUCT_ATTENTION(q, k, v)[0]
    return out


class _Pieces:
    """What is made at a time: N = sequences x G, with the R = H / G heads that share keys beside each other."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        batch, heads, self._length, width = q.shape
        self._groups, self._heads = k.shape[1], heads
        self.scale = width**-0.5
        one = heads * min(_BLOCK, self._length) * self._length
        self._sequences = min(max(1, _ROOM // max(one, 1)), max(batch, 1))
        self.room = self._sequences * one
        """The scores of a block of queries, at most."""

    def parts(self, batch: int) -> Iterator[slice]:
        """Of the batch."""
        for start in range(0, batch, self._sequences):
            yield slice(start, start + self._sequences)

    def blocks(self) -> Iterator[slice]:
        """Of the queries, the last ones first: they see all keys."""
        for start in reversed(range(0, self._length, _BLOCK)):
            yield slice(start, min(start + _BLOCK, self._length))

    def grouped(self, x: Tensor) -> Tensor:
        """[b, H or G, T, E] -> [N, R or 1, T, E]."""
        return x.reshape(len(x) * self._groups, -1, *x.shape[2:])

    def mask(self, q: Tensor) -> Tensor:
        """What is added to the scores of the last block, [R b, T] in fp32; a block before takes the last columns of it."""
        block = min(_BLOCK, self._length)
        mask = q.new_zeros(block, self._length, dtype=torch.float32)
        ahead = torch.ones(block, block, dtype=torch.bool).triu(1)
        mask[:, self._length - block :].masked_fill_(ahead, float("-inf"))
        return mask


class _Taken:
    """A buffer that is handed out from front to back."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._at = buffer, 0

    def next(self, *shape: int) -> Tensor:
        start, self._at = self._at, self._at + math.prod(shape)
        return self._buffer[start : self._at].view(shape)


def _softmax_elements(q: Tensor) -> int:
    # Of whole blocks 1, 2, ... n blocks wide, and of the rest.
    batch, heads, length, _ = q.shape
    whole, rest = length // _BLOCK, length % _BLOCK
    return batch * heads * (_BLOCK * _BLOCK * (whole * (whole + 1) // 2) + rest * length)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pieces = _Pieces(q, k)
    out, kept = _as_attention_gives(q), q.new_empty(_softmax_elements(q))
    mask, room, taken = pieces.mask(q), q.new_empty(pieces.room, dtype=torch.float32), _Taken(kept)
    for part in pieces.parts(len(q)):
        queries = pieces.grouped(q[part]).float() * pieces.scale
        keys, values = pieces.grouped(k[part]).squeeze(1).float(), pieces.grouped(v[part]).squeeze(1)
        for block in pieces.blocks():
            rows, seen = queries[:, :, block].flatten(1, 2), slice(block.stop)
            hidden = mask[block.start - block.stop :, q.shape[2] - block.stop :].repeat(queries.shape[1], 1)
            shape = (len(rows), rows.shape[1], block.stop)
            scores = torch.baddbmm(hidden, rows, keys[:, seen].transpose(1, 2), out=_Taken(room).next(*shape))
            p = taken.next(*shape).copy_(softmax(scores, out=scores))
            out[part, :, block] = torch.bmm(p, values[:, seen]).view_as(out[part, :, block])
    return out, kept


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # P = softmax(S), O = P V:  dV = Pᵀ dO;  dP = dO Vᵀ;  dS = P (dP - Σ P dP);  dQ = dS K;  dK = dSᵀ Q
    pieces = _Pieces(q, k)
    of_q, of_k, of_v = (_as_attention_gives(x) for x in (q, k, v))
    rooms, taken = (
        [q.new_empty(pieces.room, dtype=dtype) for dtype in (torch.float32, torch.float32, q.dtype)],
        _Taken(kept),
    )
    for part in pieces.parts(len(q)):
        queries, keys, own_v, slopes = (pieces.grouped(x[part]) for x in (q, k, v, gradient))
        keys = keys.squeeze(1)
        values, wide_slopes = own_v.squeeze(1).float(), slopes.float()
        by_key, by_value = torch.zeros_like(values), torch.zeros_like(values)
        for block in pieces.blocks():
            slope, seen = slopes[:, :, block].flatten(1, 2), slice(block.stop)
            p = taken.next(len(slope), slope.shape[1], block.stop)
            by_value[:, seen].add_(torch.bmm(p.transpose(1, 2), slope))
            of_p, wide_p, of_scores = (_Taken(room).next(*p.shape) for room in rooms)
            torch.bmm(wide_slopes[:, :, block].flatten(1, 2), values[:, seen].transpose(1, 2), out=of_p)
            of_scores.copy_(softmax_backward(of_p, wide_p.copy_(p), out=of_p))
            by_key[:, seen].add_(torch.bmm(of_scores.transpose(1, 2), queries[:, :, block].flatten(1, 2)))
            by_query = torch.bmm(of_scores, keys[:, seen]).mul_(pieces.scale)
            of_q[part, :, block] = by_query.view_as(of_q[part, :, block])
        of_k[part] = by_key.mul_(pieces.scale).view_as(of_k[part])
        of_v[part] = by_value.view_as(of_v[part])
    return of_q, of_k, of_v


def _as_attention_gives(x: Tensor) -> Tensor:
    """[B, H, T, E] with the heads beside each other in memory, as the next product wants them."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


# --- operators of their own: recomputation and the compiler would keep what is inside ------------------------------------


@torch.library.custom_op("trainwright::product_attention", mutates_args=())
def _operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(q, k, v)


@torch.library.custom_op("trainwright::product_attention_backward", mutates_args=())
def _backward_operator(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(gradient, q, k, v, kept)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _as_attention_gives(q), q.new_empty(_softmax_elements(q))


@_backward_operator.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _as_attention_gives(q), _as_attention_gives(k), _as_attention_gives(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _operator_backward(
    ctx: Any, gradient: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if gradient is None:
        return None, None, None
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.trainwright.product_attention_backward(
        gradient, *ctx.saved_tensors
    )
    return found


torch.library.register_autograd("trainwright::product_attention", _operator_backward, setup_context=_keep)
PRODUCT_ATTENTION = torch.ops.trainwright.product_attention.default
