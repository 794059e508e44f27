"""The update of a step whose weights change during its backward; what is left for the end of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainwright.errors import ContradictionError, NumericsError, UsageError
from trainwright.guard.numerics import Replay
from trainwright.normaliser import StepSums
from trainwright.optim.gradients import norm_of_squares
from trainwright.optim.in_backward import InBackward, clip_by, clip_each
from trainwright.optim.muon import Muon
from trainwright.update import StepResult, Update


@dataclass
class UpdateInBackward(Update):
    """As `Update`, with the optimizer in backward. A step cannot be skipped or taken back: half of it has landed."""

    _hooks: InBackward = field(init=False)
    _under_way: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.optimizer.optimizer, Muon):
            raise ContradictionError(
                "optimizer.name=muon with fused.optimizer_in_backward",
                "Muon needs whole matrices, gathered from all ranks at once",
                "optimizer.name=adamw, or fused.optimizer_in_backward=false",
            )
        self._hooks = InBackward(self.optimizer)

    def begin(self, weight: Tensor, nominal: float, of_slice: bool) -> None:
        """As `Update.begin`: the factor is known before the first gradient arrives. Collective."""
        self.check()
        self._under_way = True
        total = weight.detach().to(torch.float64).clone()
        if of_slice:
            total = self.mesh.sum_over_replica(total)
        total = self.mesh.sum_over_data(total)
        factor = nominal / total.clamp(min=1.0)
        maximum, coefficient = self.config.gradient_clipping, None
        if maximum is not None:
            late = self.config.fused.clipping == "late"
            coefficient = clip_by(self.last_norm, maximum) if late else clip_each(maximum)
        self._hooks.keep = self.observe is not None
        self._hooks.begin(factor, coefficient, idle=total.item() == 0)

    def check(self) -> None:
        """Raises UsageError after a backward that did not end."""
        if self._under_way:
            raise UsageError(
                "a call after a backward that did not end, with fused.optimizer_in_backward",
                "some weights have been updated and others not: this engine trains and saves no more",
                "start again from the last checkpoint",
            )

    def run(self, step: int, sums: StepSums, replay: Replay | None) -> StepResult:
        """As `Update.run`, when all weights have been updated. Raises NumericsError where a gradient was not finite."""
        self._hooks.end()
        device = self.mesh.device
        parameters = [p for _, p in self.parameters if p.requires_grad]
        norm = norm_of_squares(self._hooks.squares, parameters, device)
        told = torch.cat([norm.view(1), self._totals(sums)]).tolist()
        self._check(step, told)
        if self.observe is not None:
            self.observe(self.parameters, torch.ones((), dtype=torch.float64))
        lr = self.optimizer.lr
        if not self._hooks.idle:
            self.lr.after_step()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad()
        self.lr.before_step(step + 1)
        if not math.isfinite(told[0]):
            raise NumericsError(
                f"a gradient of step {step + 1} is not finite, and weights have been updated with it",
                "with fused.optimizer_in_backward a step cannot be skipped",
                "start again from the last checkpoint with fused.optimizer_in_backward=false, which skips such steps "
                "and names the module",
            )
        self._under_way = False
        return self._result(step, told, sums.counted, lr, self.scaler.scale)
