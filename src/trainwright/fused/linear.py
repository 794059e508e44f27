"""Matrix products in a narrow format on CPUs that have no fast instruction for it.

There torch emulates them, 10 to 100 times slower than fp32's, or uses an instruction of half fp32's rate. The same
result comes from widening the operands, multiplying in fp32 and rounding once: products of two bf16 or fp16 numbers
are exact in fp32, and native units add up in fp32 too. What is kept for backward stays narrow.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trainwright.other_machines import planned_for
from trainwright.torch_private import cpu_bf16_is_fast


def _lacked() -> tuple[torch.dtype, ...]:
    # Decided by the processor's flags, not by a measurement: a run must not change its arithmetic between launches.
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    return (torch.float16,) if cpu_bf16_is_fast() else (torch.float16, torch.bfloat16)


_LACKED = _lacked()


def _cpu_lacks(dtype: torch.dtype) -> bool:
    return dtype in _LACKED


def widens(x: Tensor) -> bool:
    """Whether products of tensors like `x` are better made in fp32 on this machine."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2 and not planned_for() and _cpu_lacks(x.dtype)


_results_kept = False


@contextmanager
def results_kept() -> Iterator[None]:
    """Inside it results of products are kept for backward, by selective recomputation, which must see the narrow ones."""
    global _results_kept
    before, _results_kept = _results_kept, True
    try:
        yield
    finally:
        _results_kept = before


# An operator of its own, so that what recomputation keeps of it is the narrow result, not the fp32 one inside.
torch.library.define("trainwright::wide_linear", "(Tensor x, Tensor weight) -> Tensor")


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.mm(x.reshape(-1, x.shape[-1]).float(), weight.float().t())
    return wide.to(x.dtype).view(*x.shape[:-1], len(weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wide = gradient.float()
    x_gradient = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
    weight_gradient = None
    if ctx.needs_input_grad[1]:
        flat = wide.reshape(-1, wide.shape[-1])
        weight_gradient = (flat.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
    return x_gradient, weight_gradient


torch.library.impl("trainwright::wide_linear", ("cpu", "meta"), _forward)
torch.library.register_autograd("trainwright::wide_linear", _backward, setup_context=_keep)
WIDE_LINEAR = torch.ops.trainwright.wide_linear.default
INSIDE: dict[Any, Callable[..., Any]] = {WIDE_LINEAR: _forward}
"""Operator -> the function that shows what is inside it."""


def linear(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "F D"]) -> Float[Tensor, "*batch F"]:
    """x weightᵀ, by way of fp32 where the processor asks for it."""
    if widens(x) and x.dtype == weight.dtype:
        if torch.compiler.is_compiling() and not _results_kept:  # it keeps what is narrow, and fuses the casts
            return F.linear(x.float(), weight.float()).to(x.dtype)
        out: Tensor = WIDE_LINEAR(x, weight)
        return out
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear without a bias whose product goes through `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        return linear(input, self.weight)


def widen_products(model: nn.Module) -> int:
    """Sends the products of a model that is not ours through `linear`: its nn.Linear layers and Hugging Face's Conv1D.

    Does nothing to wide formats, and nothing where the processor has the instructions. In place; parameter names stay.
    Returns the number of layers.
    """
    count = 0
    for module in model.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.forward = functools.partial(_linear_forward, module)
        elif kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
            module.forward = functools.partial(_conv1d_forward, module)
        else:
            continue
        count += 1
    return count


def _linear_forward(module: Any, input: Tensor) -> Tensor:
    out = linear(input, module.weight)
    return out if module.bias is None else out + module.bias


def _conv1d_forward(module: Any, x: Tensor) -> Tensor:
    """Hugging Face's GPT-2 layer: x weight + bias, weight [D, F]."""
    out: Tensor = linear(x, module.weight.t()) + module.bias
    return out
