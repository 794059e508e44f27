"""Causal attention of a narrow format on CPUs that have no fast instruction for it: computed in fp32, kept narrow.

As with `linear`: queries, keys and values widen without loss, and the result is rounded once. For backward q, k, v and the
result are kept in their own format, with the logarithms of the sums (Dao et al., FlashAttention, arXiv 2205.14135): half of
what fp32 attention would keep.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trainwright.torch_private import cpu_flash_attention, cpu_flash_attention_backward


def wide_attention(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B G T E"], v: Float[Tensor, "B G T E"]
) -> Float[Tensor, "B H T E"]:
    """softmax(q kᵀ / sqrt(E)) v, where no query sees ahead; H is a multiple of G."""
    return _WideAttention.apply(q, k, v)


class _WideAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.groups = q.shape[1] // k.shape[1]
        keys, values = _repeated(ctx.groups, k, v)
        out, log_sums = cpu_flash_attention(q.float(), keys, values)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, log_sums = ctx.saved_tensors
        keys, values = _repeated(ctx.groups, k, v)
        by_query, *by_key = cpu_flash_attention_backward(
            gradient.float(), q.float(), keys, values, out.float(), log_sums
        )
        if ctx.groups > 1:
            by_key = [part.unflatten(1, (-1, ctx.groups)).sum(2) for part in by_key]
        return by_query.to(q.dtype), by_key[0].to(q.dtype), by_key[1].to(q.dtype)


def _repeated(times: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In fp32, each head as often as there are queries' heads for it."""
    if times == 1:
        return k.float(), v.float()
    return k.float().repeat_interleave(times, dim=1), v.float().repeat_interleave(times, dim=1)
