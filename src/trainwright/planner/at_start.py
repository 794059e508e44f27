"""The plan of a run, made before its ranks meet, and held against what is then measured."""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from trainwright import distributed
from trainwright.callbacks import Callback
from trainwright.config import Config, Resolved
from trainwright.config.check import check_trainable
from trainwright.config.data_schema import BatchConfig
from trainwright.config.schema import RecomputeConfig
from trainwright.data.mix import open_dataset
from trainwright.data.plan import plan_batches, share_of_group
from trainwright.errors import ConfigError, TrainwrightError
from trainwright.launcher_variables import read_launch
from trainwright.mesh import resolve_degrees
from trainwright.model_source import Model, model_for
from trainwright.monitor.flops import resident_bytes
from trainwright.monitor.metrics import StepRecord
from trainwright.monitor.words import byte_size
from trainwright.planner import on_gpus
from trainwright.planner.calibrate import known_rates
from trainwright.planner.choose import Chosen, Machines, Ways, choose, does_not_fit, format_of
from trainwright.planner.forecast import Forecast, forecast
from trainwright.planner.on_gpus import GpuForecast
from trainwright.planner.room import Room, check_disk, checkpoint_bytes, room_for
from trainwright.train import TrainingLoop

_SHORT_STEPS = 50
_SHORT_S = 60.0
_BYTES_A_PARAMETER = 24
"""More than the states of any small run: what is far below the memory there is needs no forecast to be let through."""
_AFTER_STEPS = 10
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class RunPlan:
    """What rank 0 found out for all ranks before they met."""

    resolved: Resolved
    said: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    step_s: float | None = None
    """None where the machine's rates are not known."""
    memory_bytes: int | None = None
    """Of a rank, beyond what a process holds before it has a model. None for short runs and those with offload, which are not forecast."""

    def to_json(self) -> dict[str, Any]:
        """For the first line of metrics.jsonl."""
        return {"step_time_s": self.step_s, "memory_bytes": self.memory_bytes}


class Planned:
    """`plan_run` on rank 0 as the others are still on their way, and its error kept until all can hear it."""

    def __init__(self, resolved: Resolved) -> None:
        self._plan: RunPlan | None = None
        self._error: TrainwrightError | None = None
        if read_launch().rank == 0:
            try:
                self._plan = plan_run(resolved, Path(resolved.config.run_dir or "runs"))
            except TrainwrightError as error:
                self._error = error

    def agreed(self) -> RunPlan:
        """The same on all ranks. Collective. Raises what planning raised on rank 0, on all of them."""
        plan, error = distributed.from_main((self._plan, self._error))
        if error is not None:
            raise error
        assert isinstance(plan, RunPlan), "rank 0 has a plan or an error"
        return plan


def plan_run(resolved: Resolved, run_dir: Path) -> RunPlan:
    """The strategy where `strategy: auto` leaves it to us, and the forecast of memory and time. Before any process group runs.

    Raises ConfigError for a run that cannot fit into this machine's memory or onto its disk, with the nearest that can.
    """
    config = resolved.config
    check_trainable(config)
    if config.strategy == "auto":
        _check_alone()
    elif dist.is_initialized():
        return RunPlan(resolved)
    launch = read_launch()
    machines = Machines(launch.world_size, launch.local_world_size, _device(config))
    vocab_size = open_dataset(config.data).vocab_size
    if config.strategy == "auto":
        chosen = choose(_of_one_group(resolved), machines, vocab_size=vocab_size)
        return _with_chosen(resolved, chosen, run_dir)
    if machines.device == "cuda":
        told = on_gpus.forecast(_of_one_group(resolved), machines.world_size, machines.local_ranks, vocab_size)
        return RunPlan(resolved) if told is None else _by_catalogue(resolved, told, run_dir)
    if not _worth_a_forecast(config, vocab_size, machines):
        return RunPlan(resolved)
    return replace(_with_forecast(_of_one_group(resolved), machines, vocab_size, run_dir), resolved=resolved)


def _of_one_group(resolved: Resolved) -> Resolved:
    """With what this group has of the batch, where groups of ranks train by themselves (`outer`)."""
    config = resolved.config
    batch = share_of_group(config.batch, config.data.sequence_length, config.outer.groups)
    return replace(resolved, config=config.model_copy(update={"batch": batch}))


def strategy_for(model: Model, resolved: Resolved) -> Resolved:
    """`resolved` with the strategy that `strategy: auto` asks for, the same on all ranks. Collective.

    Raises ConfigError where nothing fits, and where a process group runs already.
    """
    _check_alone()
    launch, chosen, error = read_launch(), None, None
    if launch.rank == 0:
        machines = Machines(launch.world_size, launch.local_world_size, _device(resolved.config))
        try:
            found = choose(
                resolved, machines, model=lambda: _on_meta(model) if isinstance(model, nn.Module) else model()
            )
            chosen = (found.changes, found.why)
        except TrainwrightError as raised:  # on all ranks alike: the others wait for this one
            error = raised
    distributed.start(resolved.config.parallel.backend)
    chosen, error = distributed.from_main((chosen, error))
    if error is not None:
        raise error
    assert chosen is not None, "rank 0 has a strategy or an error"
    changes, why = chosen
    if distributed.is_main():
        print(f"strategy auto: {why}", file=sys.stderr)
    return Chosen(changes, why, None).apply(resolved)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without values, in which what was shared is."""
    held = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, {**held, **{id(b): b.to("meta") for b in module.buffers()}})


def _check_alone() -> None:
    if dist.is_initialized():  # a caller's own: nothing can be tried on fake ranks beside it
        raise ConfigError(
            "strategy=auto where a process group runs already",
            "a strategy is chosen before the ranks meet",
            "call initialize before torch.distributed is started, or strategy=manual",
        )


def _device(config: Config) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and config.parallel.backend != "gloo" else "cpu"


def _with_chosen(resolved: Resolved, chosen: Chosen, run_dir: Path) -> RunPlan:
    if chosen.on_gpus is not None:
        return _by_catalogue(chosen.apply(resolved), chosen.on_gpus, run_dir, f"strategy auto: {chosen.why}")
    told = chosen.forecast
    warning = check_disk(resolved.config, checkpoint_bytes(told.run), run_dir) if told is not None else None
    return RunPlan(
        chosen.apply(resolved),
        (f"strategy auto: {chosen.why}",),
        (warning,) if warning else (),
        told.time.total if told is not None and told.time is not None else None,
        told.memory_bytes if told is not None else None,
    )


def _with_forecast(resolved: Resolved, machines: Machines, vocab_size: int, run_dir: Path) -> RunPlan:
    rates = known_rates(machines.local_ranks, (format_of(resolved.config),))
    room = room_for(machines.local_ranks)
    told = forecast(resolved, machines.world_size, rates, vocab_size=vocab_size)
    warning = check_disk(resolved.config, checkpoint_bytes(told.run), run_dir)
    warnings = (warning,) if warning else ()
    if not _in_memory(resolved.config):
        return RunPlan(resolved, warnings=warnings)
    if told.memory_bytes > room.memory_bytes:
        raise _too_large(resolved, told, machines, room, vocab_size)
    seconds = told.time.total if told.time is not None else None
    return RunPlan(resolved, (), warnings, seconds, told.memory_bytes)


def _by_catalogue(resolved: Resolved, told: GpuForecast, run_dir: Path, *said: str) -> RunPlan:
    warnings = (told.warning, check_disk(resolved.config, told.checkpoint_bytes, run_dir))
    return RunPlan(resolved, said, tuple(w for w in warnings if w), told.step_s, told.memory_bytes)


def _in_memory(config: Config) -> bool:
    """Nothing is offloaded to where the forecast does not look: it counts, and times, all states in memory."""
    return config.offload == type(config.offload)()


def _too_large(resolved: Resolved, told: Forecast, machines: Machines, room: Room, vocab_size: int) -> ConfigError:
    """With the nearest strategy that fits, whatever of it the config had settled."""
    largest = sorted(told.run.memory, key=lambda row: -row.at_peak_bytes)[:2]
    most = ", ".join(f"{row.kind} {byte_size(row.at_peak_bytes)}" for row in largest)
    config = resolved.config
    degrees = resolve_degrees(config.parallel, config.zero.stage, machines.world_size)
    size = plan_batches(config.batch, config.data.sequence_length, degrees.replicate * degrees.shard).global_size
    free = Resolved(
        config.model_copy(update={"batch": BatchConfig(global_size=size), "recompute": RecomputeConfig()}),
        {k: v for k, v in resolved.sources.items() if not k.startswith(("zero.", "recompute.", "batch."))},
    )
    ways = Ways(free, machines, None, vocab_size=vocab_size)
    nearest = next((way for way in ways.ladder() if way.forecast.memory_bytes <= room.memory_bytes), None)
    if nearest is None:
        return does_not_fit(ways, room)
    batch = f"'batch={{global_size: {size * config.outer.groups}, micro_size: {nearest.micro_size}}}'"
    words = f"zero.stage={nearest.stage} recompute={nearest.recompute} {batch}"
    return ConfigError(
        f"a run that needs {byte_size(told.memory_bytes)} a rank (most of it {most}), where {byte_size(room.memory_bytes)} may be "
        f"taken: {room.where}",
        "a run fits into the memory of its machine; nothing was allocated",
        f"{words} ({byte_size(nearest.forecast.memory_bytes)})",
    )


def _worth_a_forecast(config: Config, vocab_size: int, machines: Machines) -> bool:
    """Long runs, and those whose size is no small matter: a forecast takes some seconds."""
    long = config.steps is None or config.steps >= _SHORT_STEPS
    if config.duration is not None:
        long = config.duration >= _SHORT_S
    if long:
        return True
    assert config.model is not None, "check_trainable comes first"
    model, _ = model_for(config.model, vocab_size)
    needed = _BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters())
    return needed > 0.1 * room_for(machines.local_ranks).memory_bytes


@dataclass
class PlanCheck(Callback):
    """Says, after some steps, what was planned beside what is measured. Rank 0's figures."""

    plan: RunPlan
    before_bytes: int
    """What is measured of the process before it has a model: 0 on GPUs, where the model's memory is counted apart."""
    measured: dict[str, float] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)

    @property
    def _beyond(self) -> str:
        return " beyond the process" if self.before_bytes else ""

    @classmethod
    def begin(cls, plan: RunPlan) -> PlanCheck:
        """Before the model is made."""
        return cls(plan, 0 if _device(plan.resolved.config) == "cuda" else resident_bytes())

    def on_step_end(self, loop: TrainingLoop, record: StepRecord) -> None:
        """After some steps of this launch, once."""
        if self.measured or self.plan.memory_bytes is None:
            return
        self._seconds.append(record.step_time_s)
        if len(self._seconds) < _AFTER_STEPS:
            return
        self.measured = {
            "step_time_s": statistics.median(self._seconds[_WARM_UP_STEPS:]),
            "memory_bytes": max(0, (record.peak_memory_bytes or 0) - self.before_bytes),
        }
        told = [
            f"{byte_size(self.plan.memory_bytes)} a rank planned{self._beyond}, {byte_size(self.measured['memory_bytes'])} measured"
        ]
        if self.plan.step_s is not None:
            told.insert(
                0,
                f"{self.plan.step_s * 1e3:,.0f} ms a step planned, {self.measured['step_time_s'] * 1e3:,.0f} measured",
            )
        loop.console.say("; ".join(told))

    def to_json(self) -> dict[str, Any] | None:
        """For summary.json; None where nothing was planned."""
        return {"planned": self.plan.to_json(), "measured": self.measured} if self.measured else None
