"""Causal attention of a narrow format on CPUs that have no fast instruction for it: computed in fp32, kept narrow.

As with `linear`: queries, keys and values widen without loss, and the result is rounded once. For backward q, k, v and the
result are kept in their own format, with the logarithms of the sums (Dao et al., FlashAttention, arXiv 2205.14135): half of
what fp32 attention would keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trainwright.fused.linear import widens
from trainwright.fused.product_attention import by_products, product_attention
from trainwright.torch_private import cpu_flash_attention, cpu_flash_attention_backward


def own_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What serves plain causal attention of tensors like these better on this machine than torch's kernel, for training:
    (q, k, v) -> [B, H, T, E]. None where nothing does, and where no gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    if by_products(q, k, v):
        return product_attention
    return wide_attention if widens(q) else None


def wide_attention(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B G T E"], v: Float[Tensor, "B G T E"]
) -> Float[Tensor, "B H T E"]:
    """softmax(q kᵀ / sqrt(E)) v, where no query sees ahead; H is a multiple of G."""
    out: Tensor = WIDE_ATTENTION(q, k, v)[0]
    return out


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = _repeated(q.shape[1] // k.shape[1], k, v)
    out, log_sums = cpu_flash_attention(q.float(), keys, values)
    return out.to(q.dtype), log_sums


def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    keys, values = _repeated(groups, k, v)
    by_query, *by_key = cpu_flash_attention_backward(gradient.float(), q.float(), keys, values, out.float(), log_sums)
    if groups > 1:
        by_key = [part.unflatten(1, (-1, groups)).sum(2) for part in by_key]
    return by_query.to(q.dtype), by_key[0].to(q.dtype), by_key[1].to(q.dtype)


def _repeated(times: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In fp32, each head as often as there are queries' heads for it."""
    if times == 1:
        return k.float(), v.float()
    return k.float().repeat_interleave(times, dim=1), v.float().repeat_interleave(times, dim=1)


# --- operators of their own: recomputation and the compiler would keep the fp32 results inside ------------------------


@torch.library.custom_op("trainwright::wide_attention", mutates_args=())
def _operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(q, k, v)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = q.shape
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)


@torch.library.custom_op("trainwright::wide_attention_backward", mutates_args=())
def _backward_operator(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    by_query, by_key, by_value = _backward(gradient, q, k, v, out, log_sums)
    return by_query.contiguous(), by_key.contiguous(), by_value.contiguous()


@_backward_operator.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _operator_backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.trainwright.wide_attention_backward(gradient, *ctx.saved_tensors)
    return found


torch.library.register_autograd("trainwright::wide_attention", _operator_backward, setup_context=_keep)
WIDE_ATTENTION = torch.ops.trainwright.wide_attention.default
INSIDE: dict[Any, Callable[..., Any]] = {
    WIDE_ATTENTION: _forward,
    torch.ops.trainwright.wide_attention_backward.default: _backward,
}
"""Operator -> the function that shows what is inside it."""
