"""One strategy in one format, step by step beside the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.config import Resolved
from trainwright.data.batch import BatchPlan
from trainwright.distributed import from_main
from trainwright.engine import Engine
from trainwright.errors import TrainwrightError
from trainwright.precision.policy import DTYPES
from trainwright.startup import UserParts, build_engine
from trainwright.verification.collect import Collector, Placement, StepSeen, gathered_everywhere
from trainwright.verification.compare import (
    Place,
    check_data,
    compare_gradients,
    compare_values,
    relative,
    unequal_copies,
    unequal_start,
    untied,
    update_cosine,
)
from trainwright.verification.data import GlobalData
from trainwright.verification.diagnose import Explanation, explain, portion_gradients, portions_of
from trainwright.verification.lift import Float64
from trainwright.verification.reference import Reference, ReferenceStep
from trainwright.verification.report import TOLERANCES, ParameterFigures, Problem, Run, StepFigures
from trainwright.verification.source import ModelSource

_NAMED_AT_MOST = 5
"""Parameters named one by one in a failing step."""


@dataclass(frozen=True)
class Setting:
    """What one run needs: the strategy's config in the run's own format, and the reference to compare with."""

    resolved: Resolved
    source: ModelSource
    data: GlobalData
    plan: BatchPlan
    reference: Reference
    reference_dtype: str
    user: UserParts
    horizon: int | None


def run_strategy(setting: Setting) -> Run:
    """Trains `setting.data.steps` steps and compares. Collective; every rank gets the same result.

    Raises what the strategy raises where it refuses the model or the config.
    """
    engine = _build(setting)
    try:
        run = _Comparison(setting, engine).run()
    finally:
        engine.close()
    return from_main(run)


def _build(setting: Setting) -> Engine:
    """The engine. Where one rank refuses, all do: the others must not wait for it."""
    engine, refusal = None, None
    try:
        engine = build_engine(
            setting.source.for_strategy(), setting.resolved, setting.user, setting.horizon, setting.plan.accumulation
        )
    except TrainwrightError as error:
        refusal = error
    for one in gathered_everywhere(refusal):
        if one is not None:
            raise one
    assert engine is not None, "no rank refused"
    return engine


class _Comparison:
    """State of one run: what is learnt at the start is needed at each step."""

    def __init__(self, setting: Setting, engine: Engine) -> None:
        self.setting, self.engine = setting, engine
        self.config = setting.resolved.config
        self.main = dist.get_rank() == 0
        self.reference = setting.reference
        self.collector = Collector(engine)
        self.layout = self.collector.layout
        self.places = _places(engine)
        self.ties: dict[str, str] = from_main(self.reference.ties if self.main else {})
        dtype = self.config.precision.dtype
        self.result = Run(dtype, setting.reference_dtype, TOLERANCES[dtype])
        self.figures: dict[str, ParameterFigures] = {}

    def run(self) -> Run:
        """All steps. After the first that does not hold rank 0 looks no further: what follows would only repeat it."""
        self._compare_start()
        replica = self.engine.parts.mesh.data_parallel_rank
        shares = self.setting.data.shares(self.setting.plan, replica, self.engine.parts.mesh.data_parallel_size)
        for step, batch in enumerate(shares):
            if self.reference.gradients_only:
                self._hand_over_weights(step)
            with self._lifted():
                loss = self.engine.train_batch(batch)
            seen = self.collector.step()
            if self.main and self.result.ok:
                self._compare_step(step, loss, seen)
        self._compare_end()
        self.result.parameters = list(self.figures.values())
        return self.result

    def _lifted(self) -> AbstractContextManager[Any]:
        exact = self.config.precision.dtype == "fp64" and not self.setting.source.ours
        return Float64() if exact else nullcontext()

    def _hand_over_weights(self, step: int) -> None:
        weights = self.collector.weights().whole
        if self.main:
            self.reference.load(step, {self.ties.get(name, name): tensor for name, tensor in weights.items()})

    def _compare_start(self) -> None:
        found, apart = self.collector.weights(), self.collector.tied_apart(self.ties)
        if not self.main:
            return
        for name, placement in self.layout.items():
            self.figures[name] = ParameterFigures(name, placement.text)
        problems = self.result.problems
        problems += untied(found.whole, self.ties, apart, 0, self.layout)
        if self.config.init_from is not None:
            self.reference.start_from({self.ties.get(name, name): tensor for name, tensor in found.whole.items()})
        problems += unequal_start(found.whole, self.reference.start, self.ties, self.layout)
        problems += unequal_copies(found.pieces, "the first weights", 0, self.layout)

    def _compare_step(self, step: int, loss: float, seen: StepSeen) -> None:
        record = self.engine.last_step
        assert record is not None, "a step has been made"
        number, problems = step + 1, self.result.problems
        expected = self.reference.result(step)
        whole, plan = self.setting.data.whole(step), self.setting.plan
        replicas = self.engine.parts.mesh.data_parallel_size
        problems += check_data(seen.samples, whole, self.places, lambda r: plan.row_range(r, replicas), number)
        if record.skipped:
            text = f"step {number} was skipped: a gradient is not finite (loss scale {record.loss_scale:g})"
            problems.append(Problem("non-finite", text, number))
        tolerance = self.result.tolerance
        loss_error, norm_error = relative(loss, expected.loss), relative(record.grad_norm, expected.norm)
        if expected.norm == 0.0:
            norm_error = record.grad_norm
        if not loss_error <= tolerance.loss:
            text = f"loss of step {number}: {loss:.12g}, unsharded {expected.loss:.12g}"
            problems.append(Problem("loss", text, number, error=loss_error))
        worst = self._compare_gradients(number, seen.gradients.whole, expected)
        if not norm_error <= tolerance.norm:
            text = f"global norm of step {number}: {record.grad_norm:.12g}, unsharded {expected.norm:.12g}"
            problems.append(Problem("norm", text, number, error=norm_error))
        problems += unequal_copies(seen.gradients.pieces, "the gradient", number, self.layout)
        figures = StepFigures(
            number, loss, expected.loss, loss_error, record.grad_norm, expected.norm, norm_error, worst[0], worst[1]
        )
        self.result.steps.append(figures)

    def _compare_gradients(
        self, number: int, found: Mapping[str, Tensor], expected: ReferenceStep
    ) -> tuple[float, str]:
        """(largest error, its parameter) of a step."""
        differences, lacking = compare_gradients(found, expected, self.ties, self.result.tolerance.floor)
        for name in lacking:
            where = "the unsharded model does not have it" if name in found else "no rank trains it"
            self.result.problems.append(Problem("gradient", f"{name}: {where}", number, name))
        for name, one in differences.items():
            figures = self.figures[name]
            figures.cosine = min(figures.cosine, one.cosine)
            if one.error > figures.gradient_error:
                figures.gradient_error, figures.step = one.error, number
        ranked = sorted(differences, key=lambda n: -differences[n].error)
        tolerance = self.result.tolerance
        same_weights = number == 1 or self.reference.gradients_only
        limit = tolerance.first_gradient if same_weights else tolerance.gradient
        wrong = [name for name in ranked if limit is not None and not differences[name].error <= limit]
        for name in wrong[:_NAMED_AT_MOST]:
            one, layout = differences[name], self.layout[name]
            rank = worst = _worst_rank(found[name], expected.gradients[self.ties.get(name, name)], layout)
            text = f"gradient of {name}: off by {one.error:.3g} of its norm, cosine {one.cosine:.6f}"
            if name == wrong[0]:
                if len(wrong) > 1:
                    text += f" ({len(wrong)} of {len(differences)} parameters are off)"
                if self.result.dtype in ("fp64", "fp32"):  # in less, rounding hides whose share is missing
                    told = self._explain(number - 1, name, found[name])
                    text += "".join(f"; {sentence}" for sentence in told.sentences)
                    rank = min(told.ranks) if len(told.ranks) == 1 else worst
            where = f"{layout.text}; worst on rank {worst}"
            self.result.problems.append(Problem("gradient", text, number, name, rank, one.error, where))
        return (differences[ranked[0]].error, ranked[0]) if ranked else (0.0, "")

    def _explain(self, step: int, name: str, found: Tensor) -> Explanation:
        mesh, plan, config = self.engine.parts.mesh, self.setting.plan, self.config
        replicas = mesh.data_parallel_size
        members = [tuple(r for r, p in enumerate(self.places) if p.replica == k) for k in range(replicas)]
        ranges = [plan.row_range(k, replicas) for k in range(replicas)]
        portions = portions_of(ranges, members, plan.micro_size)
        whole = self.setting.data.whole(step)
        parts = portion_gradients(self.reference, whole, step, self.ties.get(name, name), portions, config)
        return explain(found, parts, portions, self.layout[name].boxes)

    def _compare_end(self) -> None:
        held, apart = self.collector.weights(), self.collector.tied_apart(self.ties)
        if not self.main or not self.result.ok:
            return
        found = held.whole
        steps, problems = len(self.result.steps), self.result.problems
        problems += untied(found, self.ties, apart, steps, self.layout)
        problems += unequal_copies(held.pieces, "the weights", steps, self.layout)
        if self.reference.gradients_only:
            return
        tolerance, final = self.result.tolerance, self.reference.final(steps)
        cosine = self.result.update_cosine = update_cosine(found, final, self.reference.start, self.ties)
        if not cosine >= tolerance.update_cosine:
            text = f"the weights' change over {steps} steps: its cosine with the unsharded one is {cosine:.6g}"
            problems.append(Problem("update", text, steps, error=1 - cosine))
        for name, error in compare_values(found, final, self.ties).items():
            self.figures[name].value_error = error
            if tolerance.parameter is not None and not error <= tolerance.parameter:
                text = f"{name} after {steps} steps: off by {error:.3g} of its norm"
                problems.append(Problem("parameter", text, steps, name, error=error, layout=self.layout[name].text))


def _worst_rank(found: Tensor, expected: Tensor, layout: Placement) -> int:
    """The rank whose piece of the gradient is the furthest off."""

    def error(rank: int) -> float:
        index = tuple(slice(start, stop) for start, stop in layout.boxes[rank])
        size = (found.double()[index] - expected.double()[index]).norm().item()
        return size if math.isfinite(size) else math.inf

    return max(layout.boxes, key=error)


def _places(engine: Engine) -> list[Place]:
    """Every rank's, on all ranks. Collective."""
    mesh = engine.parts.mesh
    twins = (mesh.coordinate("pipeline"), mesh.coordinate("tensor"))
    return gathered_everywhere(Place(mesh.data_parallel_rank, mesh.coordinate("context"), twins))


def reference_dtype(dtype: str) -> str:
    """The format of the reference beside a strategy in `dtype`: fp32 beside the halves."""
    return dtype if dtype in ("fp64", "fp32") else "fp32"


def make_reference(
    source: ModelSource,
    resolved: Resolved,
    dtype: str,
    device: torch.device,
    schedule: Callable[[float], float],
    data: GlobalData,
    keep: bool = False,
) -> Reference:
    """The reference of a strategy, of the given format; nothing is built before it is asked for."""
    config = resolved.config

    def build() -> torch.nn.Module:
        return source.for_reference(config, DTYPES[dtype], device)

    return Reference(build, config, schedule, data.whole, keep)
