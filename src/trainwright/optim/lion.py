"""Lion: the sign of an interpolated momentum (arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trainwright.errors import ConfigError


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay; elementwise, one state tensor (`exp_avg`) of the parameter's shape and dtype.

    For parameter p, gradient g and momentum m:  p <- p - lr (sign(b1 m + (1 - b1) g) + weight_decay p),
    then m <- b2 m + (1 - b2) g. Every element moves by lr, so lr is 3 to 10 times smaller than AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"lion: betas={betas}", "each is in [0, 1)", "betas: [0.9, 0.99]")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr, weight_decay = float(group["lr"]), group["weight_decay"]
            by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                lists = by_kind.setdefault((parameter.device, parameter.dtype), ([], [], []))
                for tensors, tensor in zip(lists, (parameter, parameter.grad, state["exp_avg"]), strict=True):
                    tensors.append(tensor)
            for parameters, grads, momenta in by_kind.values():
                updates = torch._foreach_lerp(momenta, grads, 1 - beta1)
                torch._foreach_sign_(updates)
                torch._foreach_mul_(parameters, 1 - lr * weight_decay)
                torch._foreach_add_(parameters, updates, alpha=-lr)
                torch._foreach_lerp_(momenta, grads, 1 - beta2)
        return loss
