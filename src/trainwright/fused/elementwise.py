"""RMSNorm, rotary embedding and SwiGLU with few passes over memory and little kept for backward.

For eager execution, where every operation is a pass of its own; under torch.compile the plain operations are given to
the compiler, which fuses them better. Narrow inputs are computed in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over the last dimension; keeps its input and one number a row."""

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float | None) -> Float[Tensor, "*batch D"]:
    """x / sqrt(mean(x²) + eps) * weight; eps None is the format's epsilon."""
    if torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [*batch, 1]
        ctx.save_for_backward(x, weight, scale)
        return x.to(wide).mul(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # y = w n with n = x s, s = 1/rms: dw = Σ dy n;  dx = s (w dy - n mean(w dy n))
        x, weight, scale = ctx.saved_tensors
        wide = scale.dtype
        flat, width = gradient.to(wide).reshape(-1, gradient.shape[-1]), x.shape[-1]
        scale = scale.reshape(-1, 1)
        normed = x.to(wide).reshape(-1, width).mul(scale)
        product = flat * normed
        weight_gradient = product.sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, None
        wide_weight = weight.to(wide)
        mean = product.mv(wide_weight).div_(width).unsqueeze(1)
        out = torch.mul(flat, wide_weight, out=product).sub_(normed.mul_(mean)).mul_(scale)
        return out.reshape(x.shape).to(x.dtype), weight_gradient, None


def rotate(x: Float[Tensor, "B T H E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H E"]:
    """Turns the pairs (x[e], x[e + E/2]) by the position's angle (Hugging Face's halves; arXiv 2104.09864).

    cos, sin: broadcast to [B, T, H, E/2], in fp32, without gradients.
    """
    if torch.compiler.is_compiling():
        first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return _Rotate.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second = wide.chunk(2, dim=-1)
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=low)
    torch.mul(second, cos, out=high)
    low.addcmul_(second, sin, value=-sign)
    high.addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1.0), None, None  # a rotation's transpose turns back


def swiglu(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    """silu(gate) up (Shazeer, arXiv 2002.05202); silu(gate) is made again in backward."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        up_gradient = F.silu(gate).mul_(gradient) if ctx.needs_input_grad[1] else None
        gate_gradient = None
        if ctx.needs_input_grad[0]:
            inner = gradient * up
            gate_gradient = torch.ops.aten.silu_backward(inner, gate)
        return gate_gradient, up_gradient
