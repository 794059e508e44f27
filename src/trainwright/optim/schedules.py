"""Learning-rate schedules: pure functions from the optimizer step to a factor on the peak learning rate.

Step 0 is the first. The warm-up of w steps rises in a straight line, (step + 1) / (w + 1), and meets 1 at step w, so
that no step is spent at a rate of 0. Over the rest of the horizon, p = (step - w) / (horizon - w) goes from 0 to 1
and the shape from 1 to `final_fraction`, f, where it stays:

    constant     1
    linear       f + (1 - f) (1 - p)
    cosine       f + (1 - f) (1 + cos(pi p)) / 2                 arXiv 1608.03983, without restarts
    wsd          1, then linear to f over the last `decay_fraction` of the horizon       arXiv 2404.06395
    one_cycle    warm-up along a cosine from 1/25, by default 30% of the horizon; then like cosine  arXiv 1708.07120
    polynomial   f + (1 - f) (1 - p)^power
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trainwright.config.schema import LrScheduleConfig
from trainwright.errors import ContradictionError, UsageError
from trainwright.optim.handle import OptimizerHandle

_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_WARMUP = 0.3


@dataclass(frozen=True)
class Schedule:
    """A schedule of the config: call it with the step (a fraction is fine, as from tokens) to get the factor."""

    name: str
    horizon_steps: int | None
    warmup_steps: int = 0
    final_fraction: float = 0.0
    decay_fraction: float = 0.2
    power: float = 1.0

    def __call__(self, step: float) -> float:
        """The factor on the peak learning rate, in [0, 1]."""
        if step < self.warmup_steps:
            rise = (step + 1) / (self.warmup_steps + 1)
            if self.name == "one_cycle":
                return _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * (1 - math.cos(math.pi * rise)) / 2
            return rise
        if self.name == "constant":
            return 1.0
        assert self.horizon_steps is not None, "build_schedule gives every decaying schedule a horizon"
        length = self.horizon_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / length)
        return self.final_fraction + (1 - self.final_fraction) * self._shape(progress, step)

    def _shape(self, progress: float, step: float) -> float:
        """From 1 to 0 as progress goes from 0 to 1."""
        if self.name in ("cosine", "one_cycle"):
            return (1 + math.cos(math.pi * progress)) / 2
        if self.name == "wsd":
            assert self.horizon_steps is not None
            decay_steps = self.decay_fraction * self.horizon_steps
            return min(1.0, max(0.0, (self.horizon_steps - step) / decay_steps))
        return float((1 - progress) ** (self.power if self.name == "polynomial" else 1.0))


def build_schedule(config: LrScheduleConfig, horizon_steps: int | None) -> Schedule:
    """The schedule of `config` over `horizon_steps` optimizer steps.

    Raises ContradictionError: no horizon where one is needed, a warm-up that leaves nothing of it, settings that
    this shape does not have.
    """
    _refuse_idle_settings(config)
    if horizon_steps is None and (config.name != "constant" or config.warmup_fraction is not None):
        raise ContradictionError(
            f"lr_schedule.name={config.name} without a horizon",
            "a schedule that ends, or a warm-up in shares, needs to know the number of steps",
            "steps: 1000 (or tokens, epochs, duration), or lr_schedule.name: constant with warmup_steps",
        )
    warmup = _warmup_steps(config, horizon_steps)
    if horizon_steps is not None and warmup >= horizon_steps and warmup > 0:
        raise ContradictionError(
            f"a warm-up of {warmup} steps in a run of {horizon_steps}",
            "the warm-up is shorter than the run",
            f"lr_schedule.warmup_steps: {horizon_steps // 10}",
        )
    if config.name == "wsd":
        assert horizon_steps is not None
        stable = (1 - config.decay_fraction) * horizon_steps
        if warmup > stable + 1e-9 * horizon_steps:
            raise ContradictionError(
                f"wsd: warm-up of {warmup} and decay of {horizon_steps - stable:g} steps in a run of {horizon_steps}",
                "both fit into the run",
                f"lr_schedule.warmup_steps: {int(stable / 2)}",
            )
    return Schedule(config.name, horizon_steps, warmup, config.final_fraction, config.decay_fraction, config.power)


def _warmup_steps(config: LrScheduleConfig, horizon_steps: int | None) -> int:
    if config.warmup_fraction is not None:
        if config.warmup_steps:
            raise ContradictionError(
                f"lr_schedule: warmup_steps={config.warmup_steps} and warmup_fraction={config.warmup_fraction}",
                "one of the two",
                f"lr_schedule: {{warmup_steps: {config.warmup_steps}}}",
            )
        assert horizon_steps is not None
        return round(config.warmup_fraction * horizon_steps)
    if config.name == "one_cycle" and not config.warmup_steps:
        assert horizon_steps is not None
        return int(_ONE_CYCLE_WARMUP * horizon_steps)
    return config.warmup_steps


def _refuse_idle_settings(config: LrScheduleConfig) -> None:
    """A setting that this shape does not have must be at its default."""
    owners = {"final_fraction": "not constant", "decay_fraction": "wsd", "power": "polynomial"}
    for setting, owner in owners.items():
        acts = config.name != "constant" if owner == "not constant" else config.name == owner
        if not acts and getattr(config, setting) != LrScheduleConfig.model_fields[setting].default:
            raise ContradictionError(
                f"lr_schedule.{setting}={getattr(config, setting)} with name={config.name}",
                f"{setting} belongs to {'schedules that decay' if owner == 'not constant' else owner}",
                f"leave it out, or lr_schedule.name: {'linear' if owner == 'not constant' else owner}",
            )


class LrDriver(Protocol):
    """What the engine calls around every optimizer step."""

    def before_step(self, step: float) -> None:
        """Sets the learning rate for optimizer step `step` (0 is the first)."""

    def after_step(self) -> None:
        """An optimizer step was made (not called for a skipped one)."""

    def state(self) -> dict[str, Any]:
        """JSON-able; empty for pure functions."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes `state()` back."""


class PureLr:
    """Drives an optimizer by a pure function of the step: a `Schedule`, or the user's own."""

    def __init__(self, factor: Callable[[Any], float], handle: OptimizerHandle) -> None:
        self._factor = factor
        self._handle = handle

    def before_step(self, step: float) -> None:
        """Sets every group's peak learning rate times the factor. Raises UsageError for a factor that is none."""
        factor = self._factor(step)
        try:
            value = float(factor)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise UsageError(
                f"lr_schedule at step {step} returned {factor!r}",
                "a schedule is a function from the step to a finite factor >= 0 on the learning rate",
                "lr_schedule=lambda step: min(1.0, (step + 1) / 100)",
            )
        self._handle.set_lr_factor(value)

    def after_step(self) -> None:
        """Nothing: the step is the caller's."""

    def state(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class TorchLr:
    """Drives by the user's torch LRScheduler: stepped once per optimizer step, whatever the number of ranks."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler, handle: OptimizerHandle) -> None:
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError(
                "initialize(lr_schedule=): ReduceLROnPlateau",
                "a schedule depends on the step alone; this one on a metric",
                "step it yourself on engine.optimizer, or take lr_schedule: {name: cosine}",
            )
        if scheduler.optimizer is not handle.optimizer:
            raise UsageError(
                "initialize(lr_schedule=): this LRScheduler is tied to another optimizer",
                "it is tied to the optimizer instance that is passed with it",
                "initialize(model=..., optimizer=optimizer, lr_schedule=LambdaLR(optimizer, f))",
            )
        self._scheduler = scheduler

    def before_step(self, step: float) -> None:
        """Nothing: the scheduler has set the rate."""

    def after_step(self) -> None:
        """Advances the scheduler."""
        self._scheduler.step()

    def state(self) -> dict[str, Any]:
        """The scheduler's numbers, JSON-able; functions in it are code, and come again from the user's script."""
        return dict(_to_json(self._scheduler.state_dict()))

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes `state()` back into a scheduler that was built the same way."""
        self._scheduler.load_state_dict(_from_json(self._scheduler.state_dict(), state))


_DROPPED = object()


def _to_json(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    if isinstance(value, list | tuple):
        items = [_to_json(item) for item in value]
        return _DROPPED if any(item is _DROPPED for item in items) else items
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            items_by_key = {key: _to_json(item) for key, item in value.items()}
            return {key: item for key, item in items_by_key.items() if item is not _DROPPED}
        return {"__pairs__": [[key, _to_json(item)] for key, item in value.items()]}
    return _DROPPED


def _from_json(current: Any, saved: Any) -> Any:
    """`saved` in the types of `current` (what the scheduler has now); what was not saved stays as it is."""
    if isinstance(saved, dict) and "__pairs__" in saved:
        return type(current)(dict(saved["__pairs__"]))
    if isinstance(current, dict) and isinstance(saved, dict):
        return {**current, **{key: _from_json(current.get(key), value) for key, value in saved.items()}}
    if isinstance(current, list | tuple) and isinstance(saved, list):
        if len(current) != len(saved):
            return saved
        return type(current)(_from_json(a, b) for a, b in zip(current, saved, strict=True))
    return saved


def drive_lr(
    schedule: Schedule | Callable[[Any], float] | torch.optim.lr_scheduler.LRScheduler, handle: OptimizerHandle
) -> LrDriver:
    """The driver of `schedule`: of the config, the user's function from step to factor, or a torch LRScheduler."""
    if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        return TorchLr(schedule, handle)
    if not callable(schedule):
        raise UsageError(
            f"initialize(lr_schedule=): {type(schedule).__name__}",
            "a function from the step to a factor on the learning rate, or a torch LRScheduler",
            "lr_schedule=lambda step: min(1.0, (step + 1) / 100)",
        )
    return PureLr(schedule, handle)
