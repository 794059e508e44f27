"""AdamW that keeps less: moments in bf16, parameters in bf16 with stochastic rounding or a Kahan compensation.

Every product and sum is fp32, a block of elements at a time; only what is kept is rounded. An update of a bf16 number is often
smaller than half its last place, and would be lost: stochastic rounding keeps it on average (Gupta et al., arXiv
1502.02551; Zamirai et al., arXiv 2010.06192), a compensation keeps what was cut off (Kahan summation, the same paper). Moments are
always rounded stochastically. The noise is a function of (step, parameter), so that a resumed run rounds as
an uninterrupted one does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trainwright.errors import ConfigError

_BLOCK = 1 << 20
"""Elements that are fp32 at a time: 4 MB each for the gradient, two moments and the parameter."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), elementwise: as torch's, but for the formats of what is kept.

    moments: format of exp_avg and exp_avg_sq. rounding: of bf16 parameters; `kahan` keeps a bf16 `compensation` for each.
    decoupled: False is Adam, whose weight decay is a part of the gradient.
    """

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

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.moments, memory_format=torch.contiguous_format)
            if parameter.dtype == torch.bfloat16 and self.rounding == "kahan":
                state["compensation"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        step = int(state["step"].item())
        noise = torch.Generator(device=parameter.device)
        noise.manual_seed(zlib.crc32(f"{step} {self._order[id(parameter)]}".encode()))
        names = ("exp_avg", "exp_avg_sq", *(("compensation",) if "compensation" in state else ()))
        kept = [parameter.view(-1), *(state[name].view(-1) for name in names)]
        gradient = parameter.grad
        assert gradient is not None, "seen to by the caller"
        for block in zip(gradient.reshape(-1).split(_BLOCK), *(t.split(_BLOCK) for t in kept), strict=True):
            self._update_block(*block, group=group, step=step, noise=noise)

    def _update_block(
        self,
        gradient: Tensor,
        parameter: Tensor,
        first: Tensor,
        second: Tensor,
        compensation: Tensor | None = None,
        *,
        group: dict[str, Any],
        step: int,
        noise: torch.Generator,
    ) -> None:
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        g, w = gradient.to(wide), parameter.to(wide)
        if compensation is not None:
            w = w + compensation
        if decay and self.decoupled:
            w = w * (1.0 - lr * decay)
        elif decay:
            g = g + w * decay
        m = first.to(wide).lerp(g, 1.0 - beta1)
        v = second.to(wide).mul(beta2).addcmul_(g, g, value=1.0 - beta2)
        _keep(first, m, noise)
        _keep(second, v, noise)
        denominator = v.div_(1.0 - beta2**step).sqrt_().add_(group["eps"])
        w = w.addcdiv(m, denominator, value=-lr / (1.0 - beta1**step))
        if compensation is not None:
            parameter.copy_(w)
            compensation.copy_(w - parameter.to(wide))
        else:
            _keep(parameter, w, noise)


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
    low = torch.randint(0, 1 << 16, value.shape, generator=noise, dtype=torch.int32, device=value.device)
    rounded = (bits + low).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
