"""The update at the end of a step: unscale, one global norm, one finite check, clip, optimizer; on all ranks or on none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trainwright.config import Config
from trainwright.errors import NumericsError
from trainwright.guard.divergence import check_same_collectives, fingerprints
from trainwright.guard.numerics import Finding, Replay, find
from trainwright.mesh import Mesh
from trainwright.normaliser import StepSums
from trainwright.optim.ema import WeightAverage
from trainwright.optim.gradients import clip_coefficient, global_norm, local_gradients, scale_gradients
from trainwright.optim.handle import OptimizerHandle
from trainwright.optim.schedules import LrDriver
from trainwright.precision.loss_scaler import LossScaler


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float | None
    """Mean over the valid tokens of the global batch; None where the engine never saw the loss."""
    tokens: int
    """Valid tokens of this step's global batch; 0 where nothing was counted."""
    lr: float
    grad_norm: float
    """Global 2-norm before clipping."""
    loss_scale: float
    skipped: bool
    masked_micro_batches: int
    """Micro-batches of this step, over all ranks, without a single valid token."""
    finding: Finding | None = None
    """Of a skipped step, where values stopped being finite; None where fp16's loss scale was too large, and after the
    first of several skipped steps in a row."""


@dataclass
class Update:
    """Optimizer, schedule, scaler and average of one engine."""

    mesh: Mesh
    parameters: Sequence[tuple[str, nn.Parameter]]
    optimizer: OptimizerHandle
    lr: LrDriver
    scaler: LossScaler
    ema: WeightAverage | None
    config: Config
    second_copies: frozenset[str] = frozenset()
    """Names of parameters that another rank counts in the norm (a tied weight's second copy under pipeline)."""
    observe: Callable[[Sequence[tuple[str, nn.Parameter]], Tensor], None] | None = None
    """Sees the parameters with their summed gradients, and the factor that makes these a mean, before clipping (verify)."""
    skipped: int = 0
    """Skipped steps so far."""
    skipped_in_a_row: int = field(default=0, init=False)
    last_norm: float | None = field(default=None, init=False)
    """Global gradient norm of the last step."""

    def begin(self, weight: Tensor, nominal: float, of_slice: bool) -> None:
        """Before a backward of gradients that are divided by `nominal`; nothing to do where weights wait for its end.

        weight: valid tokens (or 1, uncounted) of this rank's micro-batch, 0-dim. of_slice: only of its slice.
        """

    def check(self) -> None:
        """Raises UsageError where the weights are not those of a whole step."""

    def run(self, step: int, sums: StepSums, replay: Replay | None) -> StepResult:
        """Makes step number `step` (0 is the first) out of the gradients that lie in the parameters. Collective.

        Raises NumericsError, on every rank, when the limit of skipped steps in a row is reached.
        """
        pairs = local_gradients([p for _, p in self.parameters if p.requires_grad])
        device = self.mesh.device
        totals = self._totals(sums)
        factor = sums.nominal / (totals[0].clamp(min=1.0) * self.scaler.scale)
        norm = global_norm(self._pairs_of_norm(pairs), device, self.mesh.sum_over_pipeline) * factor
        told = torch.cat([norm.view(1), totals]).tolist()  # the step's one host read
        self._check(step, told)
        norm_value, weight = told[:2]
        finite = math.isfinite(norm_value)
        if self.observe is not None:
            self.observe(self.parameters, factor)
        self.lr.before_step(step)
        lr, scale = self.optimizer.lr, self.scaler.scale
        if finite and weight > 0:
            scale_gradients(pairs, factor * clip_coefficient(norm, self.config.gradient_clipping))
            self.optimizer.step()
            self.lr.after_step()
            if self.ema is not None:
                self.ema.update()
        overflow = not finite and self.scaler.settings is not None and scale > self.scaler.settings.minimum
        self.scaler.update(overflow=not finite)
        try:
            finding = self._note(step, finite, overflow, pairs, replay)
        finally:
            self.optimizer.zero_grad()
        self.lr.before_step(step + 1)
        return replace(self._result(step, told, sums.counted, lr, scale), finding=finding)

    def _totals(self, sums: StepSums) -> Tensor:
        """[valid tokens, masked micro-batches, two of `guard.divergence`, loss sum where it is known], over all
        data-parallel ranks. Collective."""
        rank_sums = [sums.weight, sums.masked, *fingerprints(self.mesh.device)]
        rank_sums += [] if sums.loss is None else [sums.loss]
        return self.mesh.sum_over_data(torch.stack([t.detach().to(torch.float64) for t in rank_sums]))

    def _check(self, step: int, told: Sequence[float]) -> None:
        check_same_collectives(told[3], told[4], self.mesh, step + 1)

    def _result(self, step: int, told: Sequence[float], counted: bool, lr: float, scale: float) -> StepResult:
        """told: the norm, then `_totals`."""
        norm, weight, masked, _, _, *loss = told
        self.last_norm = norm
        return StepResult(
            step=step + 1,
            loss=(loss[0] / weight if weight else 0.0) if loss else None,
            tokens=int(weight) if counted else 0,
            lr=lr,
            grad_norm=norm,
            loss_scale=scale,
            skipped=not math.isfinite(norm),
            masked_micro_batches=int(masked),
        )

    def _pairs_of_norm(self, pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Sequence[tuple[nn.Parameter, Tensor]]:
        if not self.second_copies:
            return pairs
        copies = {id(p) for name, p in self.parameters if name in self.second_copies}
        return [pair for pair in pairs if id(pair[0]) not in copies]

    def _note(
        self,
        step: int,
        finite: bool,
        overflow: bool,
        pairs: Sequence[tuple[nn.Parameter, Tensor]],
        replay: Replay | None,
    ) -> Finding | None:
        """Counts a skipped step and looks for its cause. overflow: of fp16's loss scale, which is as it should be."""
        if finite:
            self.skipped_in_a_row = 0
            return None
        self.skipped += 1
        self.skipped_in_a_row += 1
        too_many = self.skipped_in_a_row >= self.config.precision.max_skipped_steps
        stop = not overflow and self.config.guard.non_finite == "stop"
        finding = None
        if replay is not None and (too_many or (not overflow and (stop or self.skipped_in_a_row == 1))):
            finding = find(replay, pairs, {id(p): name for name, p in self.parameters})
        if too_many or stop:
            raise self._stop(step, finding)
        return finding

    def _stop(self, step: int, finding: Finding | None) -> NumericsError:
        remedy = "a lower optimizer.lr, or gradient_clipping=1.0"
        if self.config.precision.dtype == "fp16":
            remedy = "precision=bf16, which has the range of fp32"
            if self.scaler.settings is None:
                remedy += f"; or the dynamic loss scale instead of {self.scaler.scale:g}"
        what = f"; {finding.describe()}" if finding is not None else ""
        if self.config.guard.non_finite == "stop":
            rule = "guard.non_finite=stop: a step whose gradient is not finite ends the run, no weight has changed"
            return NumericsError(f"the gradient of step {step + 1} is not finite{what}", rule, remedy)
        return NumericsError(
            f"{self.skipped_in_a_row} steps in a row skipped, the last one step {step + 1}{what}",
            "a step whose gradient is not finite is skipped on every rank, up to precision.max_skipped_steps in a row",
            remedy,
        )
