"""`strategy: auto`: fills what the config leaves open of ZeRO stage, micro-batch, recomputation (and on GPUs the degrees of
parallelism) for the machines that the job runs on. What the config sets is kept.

On CPUs a handful of strategies go through a forecast each: in what they exchange and compute, stage 1 equals stage 2 at one
micro-batch a step and is never behind it at more, and stage 3 gathers everything once more; so stages 2 (of several) and 3 are
looked at where memory asks for them alone. On GPUs it is the exhaustive search of `plan --hardware`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainwright.config import Config, Resolved
from trainwright.data.plan import rows_and_accumulation
from trainwright.errors import ConfigError
from trainwright.mesh import resolve_degrees
from trainwright.monitor.words import byte_size
from trainwright.planner import on_gpus
from trainwright.planner.calibrate import rates_here
from trainwright.planner.forecast import Forecast, forecast
from trainwright.planner.on_gpus import GpuForecast
from trainwright.planner.processor import Rates
from trainwright.planner.room import Room, room_for
from trainwright.precision.policy import DTYPES

_GOOD_TOKENS = 2048
"""Of a micro-batch on a CPU, where the search for its size begins: products are large enough, caches still hold rows."""
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Machines:
    """What the job runs on."""

    world_size: int
    local_ranks: int
    device: str
    """cpu or cuda."""


@dataclass(frozen=True)
class Chosen:
    """A strategy, and why."""

    changes: dict[str, Any]
    """Dotted key -> value: what the config left open."""
    why: str
    forecast: Forecast | None
    """None on GPUs."""
    on_gpus: GpuForecast | None = None
    """By the catalogue; None on CPUs."""

    def apply(self, resolved: Resolved) -> Resolved:
        """`resolved` with what was chosen."""
        values = {key.replace(".", "__"): value for key, value in self.changes.items()}
        return resolved.replace("strategy: auto", **values) if values else resolved


def choose(
    resolved: Resolved,
    machines: Machines,
    *,
    model: Callable[[], nn.Module] | None = None,
    vocab_size: int | None = None,
) -> Chosen:
    """The strategy for `resolved` on `machines`. Measures the machine's processors once, 15 to 30 seconds, and keeps that.

    Raises ConfigError where nothing fits, with what comes nearest, and for a batch without a size.
    """
    if machines.device == "cuda":
        words, why, told = on_gpus.choose(resolved, machines.world_size, machines.local_ranks, vocab_size)
        return Chosen(words, why, None, told)
    rates = rates_here(machines.local_ranks, (format_of(resolved.config),))
    return choose_among(Ways(resolved, machines, rates, model, vocab_size), room_for(machines.local_ranks))


def choose_among(ways: Ways, room: Room) -> Chosen:
    """The best on CPUs. Raises ConfigError where none fits `room`."""
    best = _fastest(ways, room)
    if best is None:
        best = next((way for way in ways.ladder() if way.forecast.memory_bytes <= room.memory_bytes), None)
    if best is None:
        raise does_not_fit(ways, room)
    others = [f"{way.describe()} {way.seconds * 1e3:,.0f} ms" for way in ways.looked_at() if way is not best]
    why = (
        f"{best.describe()}: {best.seconds * 1e3:,.0f} ms a step and {byte_size(best.forecast.memory_bytes)} of "
        f"{byte_size(room.memory_bytes)} a rank" + (f"; beside it {', '.join(others[:4])}" if others else "")
    )
    return Chosen(best.changes(ways.resolved), why, best.forecast)


def format_of(config: Config) -> str:
    """The compute format in torch's words, such as bfloat16."""
    return str(DTYPES[config.precision.dtype]).removeprefix("torch.")


@dataclass(frozen=True)
class Way:
    """One strategy on CPUs."""

    stage: int
    micro_size: int
    accumulation: int
    recompute: str
    replicas: int
    forecast: Forecast

    @property
    def seconds(self) -> float:
        """Of a step; 0 where no rates are known."""
        return self.forecast.time.total if self.forecast.time is not None else 0.0

    def describe(self) -> str:
        """Such as "ZeRO 2, 2 x 8 rows, recompute full": micro-batches and rows of each."""
        words = [f"ZeRO {self.stage}"] if self.replicas > 1 else []
        words.append(f"{self.accumulation} x {self.micro_size} row{'s' if self.micro_size > 1 else ''}")
        if self.recompute != "none":
            words.append(f"recompute {self.recompute}")
        return ", ".join(words)

    def changes(self, resolved: Resolved) -> dict[str, Any]:
        """What it sets of what `resolved` leaves open."""
        wanted = {"zero.stage": self.stage, "batch.micro_size": self.micro_size, "recompute.mode": self.recompute}
        if resolved.was_set("batch.accumulation"):
            del wanted["batch.micro_size"]
        return {key: value for key, value in wanted.items() if not resolved.was_set(key)}


@dataclass
class Ways:
    """The strategies that a config leaves open on CPUs, each forecast once, when it is asked for."""

    resolved: Resolved
    machines: Machines
    rates: Rates | None
    model: Callable[[], nn.Module] | None = None
    vocab_size: int | None = None
    _known: dict[tuple[int, int, str], Way] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.resolved.config
        if self.rates is not None and config.parallel.pipeline > 1:
            raise ConfigError(
                f"strategy=auto with parallel.pipeline={config.parallel.pipeline} on CPUs",
                "a pipeline's time is not forecast there",
                "strategy=manual, or leave parallel.pipeline out",
            )
        degrees = resolve_degrees(config.parallel, max(1, config.zero.stage), self.machines.world_size)
        self.replicas = degrees.replicate * degrees.shard
        rows, count = rows_and_accumulation(config.batch, config.data.sequence_length, self.replicas)
        if rows is None:
            raise ConfigError(
                "strategy=auto without a batch", "what is chosen is for steps of a known size", "batch.global_size=64"
            )
        self.rows = rows * count

    @property
    def micro_sizes(self) -> list[int]:
        """Rows of a micro-batch, the most promising first."""
        batch = self.resolved.config.batch
        if batch.micro_size is not None or batch.accumulation is not None:
            rows, _ = rows_and_accumulation(batch, self.resolved.config.data.sequence_length, self.replicas)
            assert rows is not None, "checked above"
            return [rows]
        if self.resolved.config.fused.optimizer_in_backward:  # one micro-batch a step
            return [self.rows]
        length = self.resolved.config.data.sequence_length
        sizes = list(dict.fromkeys(-(-self.rows // count) for count in range(1, self.rows + 1)))
        good = min(sizes, key=lambda size: (abs(size * length - _GOOD_TOKENS), size))
        near = [size for factor in (2, 4) if (size := good * factor) in sizes]
        less = [size for factor in (2, 4) if (size := -(-good // factor)) in sizes and size != good]
        return list(dict.fromkeys([good, *near[:1], *less[:1], *near[1:], *less[1:]]))

    @property
    def recomputes(self) -> list[str]:
        """Ways of recomputation, the fastest first."""
        mode = self.resolved.config.recompute.mode
        return [mode] if self.resolved.was_set("recompute.mode") else list(_RECOMPUTE)

    def stages(self, accumulation: int, for_memory: bool = False) -> list[int]:
        """ZeRO stages that may be fastest; or all, those that take least last."""
        config = self.resolved.config
        if self.resolved.was_set("zero.stage"):
            return [config.zero.stage]
        first = 1 if config.parallel.replicate > 1 else 0
        if self.replicas == 1:
            return [first]
        if for_memory:
            return [stage for stage in (0, 1, 2, 3) if stage >= first]
        return [*([0] if first == 0 else []), 1 if accumulation > 1 else 2]

    def way(self, stage: int, micro_size: int, recompute: str) -> Way:
        """One of them."""
        key = (stage, micro_size, recompute)
        if key not in self._known:
            count = -(-self.rows // micro_size)
            values: dict[str, Any] = {"zero__stage": stage, "recompute__mode": recompute}
            if not self.resolved.was_set("batch.accumulation"):
                values["batch__micro_size"] = micro_size
            told = forecast(
                self.resolved.replace("forecast", **values),
                self.machines.world_size,
                self.rates,
                model=self.model,
                vocab_size=self.vocab_size,
            )
            self._known[key] = Way(stage, micro_size, count, recompute, self.replicas, told)
        return self._known[key]

    def looked_at(self) -> list[Way]:
        """Those forecast so far, the fastest first."""
        return sorted(self._known.values(), key=lambda way: way.seconds)

    def ladder(self) -> Iterator[Way]:
        """From what costs least time to what takes least memory."""
        sizes = sorted(self.micro_sizes, reverse=True)
        smallest = 1 if len(sizes) > 1 else sizes[0]
        for stage in self.stages(2, for_memory=True):
            yield self.way(stage, smallest, self.recomputes[0])
        for recompute in self.recomputes[1:]:
            yield self.way(self.stages(2, for_memory=True)[-1], smallest, recompute)


def _fastest(ways: Ways, room: Room) -> Way | None:
    """The fastest that fits among those that may be: the micro-batch at one stage, then the stage."""
    recompute = ways.recomputes[0]

    def fits(way: Way) -> bool:
        return way.forecast.memory_bytes <= room.memory_bytes

    best: Way | None = None
    for micro_size in ways.micro_sizes[:3]:
        way = ways.way(ways.stages(-(-ways.rows // micro_size))[0], micro_size, recompute)
        if best is None or (fits(way), -way.seconds) > (fits(best), -best.seconds):
            best = way
    assert best is not None, "there is a micro-batch"
    others = [ways.way(stage, best.micro_size, recompute) for stage in ways.stages(best.accumulation)]
    fitting = [way for way in (best, *others) if fits(way)]
    return min(fitting, key=lambda way: way.seconds, default=None)


def does_not_fit(ways: Ways, room: Room) -> ConfigError:
    """The error of a job whose least strategy needs more than there is."""
    least = min(ways.looked_at(), key=lambda way: way.forecast.memory_bytes)
    rows = max(least.forecast.run.memory, key=lambda row: row.at_peak_bytes)
    return ConfigError(
        f"{byte_size(least.forecast.memory_bytes)} a rank at the least ({least.describe()}; most of it {rows.kind}), "
        f"where {byte_size(room.memory_bytes)} may be taken: {room.where}",
        "a run fits into the memory of its machines",
        "more ranks on other machines, a smaller model or sequence, or strategy=manual with offload.optimizer=disk",
    )
