"""Causal attention of short sequences in bf16, by batched products, on CPUs that multiply bf16 without tiles (AMX).

torch's kernel for CPUs goes block by block through products too small for such a processor: at 256 tokens these take 1.4 to
1.5 times as long as a few large ones with the scores of a block of queries between them. What is rounded is the same: scores,
softmax and the gradient in the scores are fp32 and rounded for the products that follow. For backward q, k and v are kept.
"""

from __future__ import annotations

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
    out: Tensor = PRODUCT_ATTENTION(q, k, v)
    return out


class _Scores:
    """The attention of some sequences at a time, [N, T] with N = sequences x G and R = H / G queries' heads beside each other."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        batch, heads, self._length, width = q.shape
        self._groups, self._repeats = k.shape[1], heads // k.shape[1]
        self.scale = width**-0.5
        block = min(_BLOCK, self._length)
        one = heads * block * self._length
        self._sequences = min(max(1, _ROOM // max(one, 1)), max(batch, 1))
        self.room = q.new_empty(self._sequences * one, dtype=torch.float32)
        ahead = torch.ones(block, block, dtype=torch.bool).triu(1)
        self._mask = q.new_zeros(block, self._length, dtype=torch.float32)
        self._mask[:, self._length - block :].masked_fill_(ahead, float("-inf"))

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

    def __call__(self, queries: Tensor, keys: Tensor, block: slice) -> Tensor:
        """Softmax of a block's scores [N, R b, S] in fp32, from scaled queries [N, R b, E] and keys [N, S, E] up to its end.
        It is in the room, until the next."""
        count, rows, seen = len(queries), queries.shape[1], keys.shape[1]
        mask = self._mask[block.start - block.stop :, self._length - seen :].repeat(self._repeats, 1)
        out = self.room[: count * rows * seen].view(count, rows, seen)
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), out=out)
        return softmax(scores, out=scores)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _Scores(q, k)
    out = _as_attention_gives(q)
    narrow = q.new_empty(scores.room.shape)
    for part in scores.parts(len(q)):
        queries = scores.grouped(q[part]).float() * scores.scale
        keys, values = scores.grouped(k[part]).squeeze(1).float(), scores.grouped(v[part]).squeeze(1)
        for block in scores.blocks():
            p = scores(queries[:, :, block].flatten(1, 2), keys[:, : block.stop], block)
            result = torch.bmm(_narrowed(p, narrow), values[:, : block.stop])
            out[part, :, block] = result.view_as(out[part, :, block])
    return out


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # P = softmax(S), O = P V:  dV = Pᵀ dO;  dP = dO Vᵀ;  dS = P (dP - Σ P dP);  dQ = dS K;  dK = dSᵀ Q
    scores = _Scores(q, k)
    of_q, of_k, of_v = (_as_attention_gives(x) for x in (q, k, v))
    narrow, room = q.new_empty(scores.room.shape), torch.empty_like(scores.room)
    for part in scores.parts(len(q)):
        own_q, own_k, own_v, own_gradient = (scores.grouped(x[part]) for x in (q, k, v, gradient))
        own_k, own_v = own_k.squeeze(1), own_v.squeeze(1)
        queries, keys = own_q.float() * scores.scale, own_k.float()
        values, slopes = own_v.float(), own_gradient.float()
        by_key, by_value = torch.zeros_like(keys), torch.zeros_like(keys)
        for block in scores.blocks():
            seen = slice(block.stop)
            p = scores(queries[:, :, block].flatten(1, 2), keys[:, seen], block)
            of_p = torch.bmm(
                slopes[:, :, block].flatten(1, 2), values[:, seen].transpose(1, 2), out=room[: p.numel()].view_as(p)
            )
            slope = own_gradient[:, :, block].flatten(1, 2)
            by_value[:, seen].add_(torch.bmm(_narrowed(p, narrow).transpose(1, 2), slope))
            of_scores = _narrowed(softmax_backward(of_p, p, out=of_p), narrow)
            by_key[:, seen].add_(torch.bmm(of_scores.transpose(1, 2), own_q[:, :, block].flatten(1, 2)))
            by_query = torch.bmm(of_scores, own_k[:, seen]).mul_(scores.scale)
            of_q[part, :, block] = by_query.view_as(of_q[part, :, block])
        of_k[part] = by_key.mul_(scores.scale).view_as(of_k[part])
        of_v[part] = by_value.view_as(of_v[part])
    return of_q, of_k, of_v


def _narrowed(wide: Tensor, room: Tensor) -> Tensor:
    return room[: wide.numel()].view_as(wide).copy_(wide)


def _as_attention_gives(x: Tensor) -> Tensor:
    """[B, H, T, E] with the heads beside each other in memory, as the next product wants them."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


# --- operators of their own: recomputation and the compiler would keep what is inside ------------------------------------


@torch.library.custom_op("trainwright::product_attention", mutates_args=())
def _operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _forward(q, k, v)


@torch.library.custom_op("trainwright::product_attention_backward", mutates_args=())
def _backward_operator(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(gradient, q, k, v)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _as_attention_gives(q)


@_backward_operator.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _as_attention_gives(q), _as_attention_gives(k), _as_attention_gives(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _operator_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.trainwright.product_attention_backward(
        gradient, *ctx.saved_tensors
    )
    return found


torch.library.register_autograd("trainwright::product_attention", _operator_backward, setup_context=_keep)
PRODUCT_ATTENTION = torch.ops.trainwright.product_attention.default
