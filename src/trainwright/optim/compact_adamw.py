"""AdamW that keeps less: moments in bf16 or 8 bits, parameters in bf16 with stochastic rounding or a Kahan compensation.

Every product and sum is fp32, a block of elements at a time; only what is kept is rounded. An update of a bf16 number is often
smaller than half its last place, and would be lost: stochastic rounding keeps it on average (Gupta et al., arXiv
1502.02551; Zamirai et al., arXiv 2010.06192), a compensation keeps what was cut off (Kahan summation, the same paper). Moments are
always rounded stochastically. The noise is a function of (step, parameter), so that a resumed run rounds as
an uninterrupted one does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainwright.errors import ConfigError
from trainwright.optim.blocks import BLOCK, takes
from trainwright.optim.eight_bit import EightBit, random_bits

PART = 1 << 23
"""Elements that are fp32 at a time on a GPU, 32 MB each for the gradient, two moments and the parameter: few launches."""
_PART_CPU = 1 << 16
"""On a CPU: what its cache holds."""
_SIGN, _UPPER = -(1 << 31), -(1 << 16)
_NAN = 0x7FFF0000
"""Bits of the last NaN of bf16: those above it would carry into the sign."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), elementwise: as torch's, but for the formats of what is kept.

    moments: format of exp_avg and exp_avg_sq; uint8: in 8 bits by blocks (eight_bit.py), of the parameters that `in_blocks` takes, the
    others in fp32. rounding: of bf16 parameters; `kahan` keeps a bf16 `compensation` for each.
    decoupled: False is Adam, whose weight decay is a part of the gradient.
    """

    shared_by_columns: ClassVar[Mapping[str, int]] = {
        "exp_avg_scales": BLOCK,
        "exp_avg_sq_scales": BLOCK,
    }
    """States that have one value for so many of a parameter's columns."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.bfloat16,
        rounding: str = "stochastic",
        decoupled: bool = True,
    ) -> None:
        if rounding not in ("stochastic", "kahan"):
            raise ConfigError(f"rounding {rounding!r}", "stochastic or kahan", "rounding='stochastic'")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.moments, self.rounding, self.decoupled = moments, rounding, decoupled
        self.saved_as = "torch.AdamW" if decoupled else "torch.Adam"  # with moments of either width a run goes on
        self.part: int | None = None
        """Elements that are fp32 at a time, where the device is not to say."""
        self.in_blocks: Callable[[Tensor], bool] = lambda parameter: takes(parameter.shape)
        everyone = (parameter for group in self.param_groups for parameter in group["params"])
        self._order = {id(parameter): number for number, parameter in enumerate(everyone)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def init_state(self) -> None:
        """Creates the state that first steps would: zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self._begin(parameter, self.state[parameter])

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] += 1
        step = int(state["step"].item())
        noise = torch.Generator(device=parameter.device)
        noise.manual_seed(zlib.crc32(f"{step} {self._order[id(parameter)]}".encode()))
        gradient = parameter.grad
        assert gradient is not None, "seen to by the caller"
        size = self.part or (_PART_CPU if parameter.device.type == "cpu" else PART)
        names = ("exp_avg", "exp_avg_sq", *(("compensation",) if "compensation" in state else ()))
        moments = [_parts(state, name, size) for name in names]
        parts = zip(gradient.reshape(-1).split(size), parameter.view(-1).split(size), *moments, strict=True)
        for part in parts:
            self._update_part(*part, group=group, step=step, noise=noise)

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        in_blocks = self.moments == torch.uint8 and self.in_blocks(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            if in_blocks:
                scales = (*parameter.shape[:-1], parameter.shape[-1] // BLOCK)
                state[f"{name}_codes"] = _zeros_like(parameter, torch.uint8)
                state[f"{name}_scales"] = torch.zeros(scales, dtype=torch.float32, device=parameter.device)
            else:
                state[name] = _zeros_like(parameter, torch.float32 if self.moments == torch.uint8 else self.moments)
        if parameter.dtype == torch.bfloat16 and self.rounding == "kahan":
            state["compensation"] = _zeros_like(parameter, parameter.dtype)

    def _update_part(
        self,
        gradient: Tensor,
        parameter: Tensor,
        first: _Plain | EightBit,
        second: _Plain | EightBit,
        compensation: _Plain | None = None,
        *,
        group: dict[str, Any],
        step: int,
        noise: torch.Generator,
    ) -> None:
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        g, w = gradient.to(wide), parameter.to(wide)
        if compensation is not None:
            w = w + compensation.read(wide)
        if decay and self.decoupled:
            w = w * (1.0 - lr * decay)
        elif decay:
            g = g + w * decay
        m = first.read(wide).lerp(g, 1.0 - beta1)
        v = second.read(wide).mul(beta2).addcmul_(g, g, value=1.0 - beta2)
        first.keep(m, noise)
        second.keep(v, noise)
        denominator = v.div_(1.0 - beta2**step).sqrt_().add_(group["eps"])
        w = w.addcdiv(m, denominator, value=-lr / (1.0 - beta1**step))
        if compensation is not None:
            parameter.copy_(w)
            compensation.values.copy_(w - parameter.to(wide))
        else:
            _keep(parameter, w, noise)


@dataclass(frozen=True)
class _Plain:
    """A part of a state in the format that it is kept in."""

    values: Tensor

    def read(self, wide: torch.dtype) -> Tensor:
        return self.values.to(wide)

    def keep(self, value: Tensor, noise: torch.Generator) -> None:
        _keep(self.values, value, noise)


def _parts(state: dict[str, Any], name: str, size: int) -> Iterator[_Plain | EightBit]:
    """State `name` in parts of `size` values."""
    if name in state:
        return (_Plain(values) for values in state[name].view(-1).split(size))
    codes = state[f"{name}_codes"].view(-1).split(size)
    scales = state[f"{name}_scales"].view(-1).split(size // BLOCK)
    squares = name == "exp_avg_sq"
    return (EightBit(*part, squares) for part in zip(codes, scales, strict=True))


def _zeros_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)


def _keep(target: Tensor, value: Tensor, noise: torch.Generator) -> None:
    """`value` into `target`, rounded stochastically where that is bf16."""
    if target.dtype == torch.bfloat16:
        target.copy_(stochastic_bf16(value.float(), noise))
    else:
        target.copy_(value)


def stochastic_bf16(value: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes the mean right; what is not finite stays what it is.

    bf16 is the upper half of fp32's bits: uniform noise below its last place carries into it as often as it should.
    """
    bits = value.view(torch.int32)
    signs = bits.bitwise_and(_SIGN)
    sizes = (bits ^ signs).clamp_max_(_NAN).add_(random_bits(value, noise)).bitwise_and_(_UPPER)
    return sizes.bitwise_or_(signs).view(torch.float32).to(torch.bfloat16)
