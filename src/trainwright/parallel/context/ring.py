"""torch's ring attention: keys and values pass from rank to rank, each merges what its own queries make of them
(Liu et al., arXiv 2310.01889).

Unlike Ulysses it does not share out the heads, so any number of ranks will do. The slices are contiguous here: with causal
attention the last rank computes most, up to twice the mean. Made for GPUs. Shapes as in `ulysses.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from trainwright.errors import ModelError
from trainwright.models.sequence import Attend
from trainwright.torch_private.collectives import ring_attention, ring_attention_backward

_aten = torch.ops.aten
_KERNELS = {
    "cuda": (_aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_backward.default),
    "cpu": (
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    ),
}
# What the CUDA kernel returns beside the output and its log-sum-exp, and wants back.
_STATE = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        kernel = _KERNELS[q.device.type][0]
        out, log_sum, *state = ring_attention(group, kernel, q.contiguous(), k.contiguous(), v.contiguous())
        ctx.group, ctx.state = group, dict(zip(_STATE, state, strict=False))
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sum = ctx.saved_tensors
        kernel = _KERNELS[q.device.type][1]
        saved = {"query": q, "key": k, "value": v, "out": out, "logsumexp": log_sum} | ctx.state
        first, second, third = ring_attention_backward(ctx.group, kernel, gradient.contiguous(), saved)
        return first.to(q.dtype), second.to(k.dtype), third.to(v.dtype), None


class Ring:
    """Causal attention over slices; stands in the place of a causal attention over whole sequences."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, attend: Attend) -> Attend:
        """Attention of its own, softmax(q kᵀ / sqrt E) v, causal: `attend` is not called."""
        return self._over_slices

    def _over_slices(
        self,
        q: Float[Tensor, "B H T_local E"],
        k: Float[Tensor, "B G T_local E"],
        v: Float[Tensor, "B G T_local E"],
        mask: Tensor | None,
    ) -> Float[Tensor, "B H T_local E"]:
        if mask is not None:
            raise ModelError(
                "document_ids with parallel.context_method=ring",
                "torch's ring attention is causal and takes no mask",
                "parallel.context_method=ulysses",
            )
        copies = q.shape[1] // k.shape[1]
        if copies > 1:
            k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
        out: Tensor = _RingAttention.apply(q, k, v, self.group)
        return out
