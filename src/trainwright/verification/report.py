"""What a verification found, as data: steps, parameters, problems."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """The largest relative errors that hold; docs/verify.md gives the reasons. None: reported only."""

    loss: float
    norm: float
    first_gradient: float
    """Of the first step, where both sides have the same weights to the bit."""
    gradient: float | None
    """Of the later steps."""
    parameter: float | None
    update_cosine: float
    """The least between the two sides' updates of all weights over the run."""
    floor: float
    """A gradient smaller than this share of the global norm is measured against the share instead: it may be nothing but
    rounding, as that of a key's bias under softmax is."""


def _rounded(loss: float, norm: float, unit: float, update_cosine: float) -> Tolerance:
    return Tolerance(loss, norm, 100 * unit, None, None, update_cosine, floor=1e-2)


TOLERANCES = {
    "fp64": Tolerance(1e-9, 1e-8, 1e-8, 1e-8, 1e-8, update_cosine=1 - 1e-8, floor=1e-6),
    "fp32": _rounded(1e-5, 1e-3, 2.0**-24, 0.999),
    "fp16": _rounded(3e-3, 3e-2, 2.0**-11, 0.95),
    "bf16": _rounded(2e-2, 1e-1, 2.0**-8, 0.9),
}
"""By format. The unit of roundoff of a format is 2^-24, 2^-11, 2^-8."""


@dataclass(frozen=True)
class Problem:
    """Something that does not hold."""

    kind: str
    """weights, data, loss, gradient, norm, replicas, tied, parameter, update, non-finite"""
    what: str
    step: int | None = None
    """1 is the first."""
    parameter: str | None = None
    rank: int | None = None
    error: float | None = None
    layout: str | None = None


@dataclass(frozen=True)
class StepFigures:
    """One step, strategy beside reference."""

    step: int
    loss: float
    reference_loss: float
    loss_error: float
    norm: float
    reference_norm: float
    norm_error: float
    gradient_error: float
    """Largest over the parameters."""
    worst_parameter: str


@dataclass
class ParameterFigures:
    """One parameter: the largest gradient error over the steps, and its values after the last one."""

    name: str
    layout: str
    gradient_error: float = 0.0
    """‖g - g_ref‖ / max(‖g_ref‖, 1e-6 of the global norm)"""
    cosine: float = 1.0
    """The smallest."""
    step: int = 0
    value_error: float | None = None


@dataclass
class Run:
    """One format's run of a strategy against the reference."""

    dtype: str
    reference_dtype: str
    tolerance: Tolerance
    steps: list[StepFigures] = field(default_factory=list)
    parameters: list[ParameterFigures] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    update_cosine: float | None = None
    """Between the two sides' changes of all weights, first to last; None where the reference does not run freely."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def loss_error(self) -> float:
        """Largest relative difference of a step's loss."""
        return max((s.loss_error for s in self.steps), default=0.0)

    @property
    def norm_error(self) -> float:
        return max((s.norm_error for s in self.steps), default=0.0)

    @property
    def worst(self) -> ParameterFigures | None:
        """The parameter with the largest gradient error."""
        return max(self.parameters, key=lambda p: p.gradient_error, default=None)


@dataclass
class Verification:
    """One strategy: the proof in float64 where the device can, and the config's own format beside it."""

    name: str
    strategy: str
    status: str = "held"
    """held | failed | refused"""
    reason: str = ""
    """Why it was refused, or what failed first."""
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    time_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: held, or refused by name."""
        return self.status != "failed"

    @property
    def problems(self) -> list[Problem]:
        return [problem for run in self.runs for problem in run.problems]

    @property
    def worst_error(self) -> float | None:
        """The gradient error that matters: where it failed first, else the largest of the first run (float64 if any)."""
        return next(iter(self._worst()), (None, None, None))[0]

    @property
    def worst_parameter(self) -> str | None:
        return next(iter(self._worst()), (None, None, None))[1]

    @property
    def layout(self) -> str | None:
        """How the worst parameter lies on the ranks."""
        return next(iter(self._worst()), (None, None, None))[2]

    def _worst(self) -> list[tuple[float | None, str | None, str | None]]:
        for run in self.runs:
            named = [p for p in run.problems if p.parameter is not None]
            if named:
                return [(named[0].error, named[0].parameter, named[0].layout)]
        for run in self.runs:
            if run.worst is not None:
                return [(run.worst.gradient_error, run.worst.name, run.worst.layout)]
        return []

    def to_json(self) -> dict[str, Any]:
        """A row of `--json`."""
        row: dict[str, Any] = {
            "name": self.name,
            "ok": self.ok,
            "status": self.status,
            "reason": self.reason,
            "strategy": self.strategy,
            "worst_error": self.worst_error,
            "worst_parameter": self.worst_parameter,
            "layout": self.layout,
            "time_s": round(self.time_s, 3),
            "notes": self.notes,
            "runs": [],
        }
        for run in self.runs:
            value_errors = [p.value_error for p in run.parameters if p.value_error is not None]
            row["runs"].append(
                {
                    "dtype": run.dtype,
                    "reference_dtype": run.reference_dtype,
                    "ok": run.ok,
                    "tolerance": asdict(run.tolerance),
                    "loss_error": run.loss_error,
                    "norm_error": run.norm_error,
                    "gradient_error": None if run.worst is None else run.worst.gradient_error,
                    "worst_parameter": None if run.worst is None else run.worst.name,
                    "update_cosine": run.update_cosine,
                    "cosine": min((p.cosine for p in run.parameters), default=None),
                    "value_error": max(value_errors, default=None),
                    "steps": [asdict(s) for s in run.steps],
                    "parameters": [asdict(p) for p in run.parameters],
                    "problems": [asdict(p) for p in run.problems],
                }
            )
        return row
