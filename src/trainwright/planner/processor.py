"""How long a step takes on this machine's own processors: a rank's operators and collectives, one by one, at the rates that
`calibrate` measured here.

Where GPUs' figures come from data sheets and published runs (hardware.py), a processor's come from some seconds of
measuring: machines differ, and so does what else runs on them. Every operator costs its host overhead and its work.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainwright.dry_run.collectives import Collective
from trainwright.dry_run.work import Work

Curve = tuple[tuple[float, float], ...]
"""(size, seconds), sizes rising."""


@dataclass(frozen=True)
class Rates:
    """What one of `ranks` processes that share this machine reaches, each with `threads` threads, all at work at once."""

    machine: str
    ranks: int
    threads: int
    products: dict[str, dict[str, float]]
    """Format -> "m x n x k" -> seconds of that product."""
    moved: dict[str, dict[str, Curve]]
    """Format -> elementwise, activation, softmax, lookup or update -> seconds for so many bytes read and written."""
    attention: dict[str, dict[str, Curve]]
    """Format -> attention or attention backward -> seconds a FLOP for sequences of such length."""
    collectives: dict[str, Curve]
    """Kind -> seconds for so many bytes over all ranks."""
    process_bytes: int = 0
    """What a process holds beside its tensors once it has trained: code that is loaded late, kernels' and Gloo's own memory."""
    operator_s: float = 0.0
    """What an operator costs the host beside its work: torch's dispatch, autograd, our own Python."""
    stretch: float = 1.0
    """What a whole step takes over the sum of its parts, each at its best: caches that others have emptied, fresh pages, turns on a
    core, ranks that wait for each other, and what else this machine does."""

    reference_s: float = 0.0
    """Of that whole step (calibrate.WHOLE): what the machine took for it then."""

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Rates:
        """The inverse of `to_json`. Raises TypeError or KeyError for anything else."""
        curves = {
            name: {
                dtype: {kind: tuple(map(tuple, curve)) for kind, curve in kinds.items()}
                for dtype, kinds in facts[name].items()
            }
            for name in ("moved", "attention")
        }
        collectives = {kind: tuple(map(tuple, curve)) for kind, curve in facts["collectives"].items()}
        return cls(**{**facts, **curves, "collectives": collectives})

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def at(curve: Curve, size: float) -> float:
    """Seconds at `size`, between measured sizes along a straight line of their logarithms; beyond the ends in proportion to the
    size above, and constant below."""
    sizes = [measured for measured, _ in curve]
    if size <= sizes[0]:
        return curve[0][1]
    if size >= sizes[-1]:
        return curve[-1][1] * size / sizes[-1]
    i = bisect.bisect_right(sizes, size)
    (low, here), (high, there) = curve[i - 1], curve[i]
    share = math.log(size / low) / math.log(high / low)
    return here * (there / here) ** share


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds of a step, by what they go to."""

    products: float
    attention: float
    elementwise: float
    """Everything else that moves bytes: norms, activations, the loss, copies."""
    update: float
    communication: float
    host: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(asdict(self).values())

    def extended(self, less: ProcessorTime, times: int) -> ProcessorTime:
        """With `times` more of what this step has over `less`."""
        here, there = asdict(self), asdict(less)
        return ProcessorTime(**{part: here[part] + times * (here[part] - there[part]) for part in here})


_PARTS = {"product": "products", "attention": "attention", "attention backward": "attention", "update": "update"}


def processor_time(
    rates: Rates, work: Iterable[tuple[Work, float]], collectives: Iterable[tuple[Collective, float]], operators: float
) -> ProcessorTime:
    """Of a rank's step with this work (`DryRun`'s fields)."""
    parts = dict.fromkeys(("products", "attention", "elementwise", "update"), 0.0)
    for one, times in work:
        parts[_PARTS.get(one.kind, "elementwise")] += times * work_s(rates, one)
    sent = sum(times * _collective(rates, one) for one, times in collectives)
    parts |= {"communication": sent, "host": rates.operator_s * operators}
    return ProcessorTime(**{part: rates.stretch * seconds for part, seconds in parts.items()})


def work_s(rates: Rates, work: Work) -> float:
    """Of one operator."""
    if work.kind == "product":
        return _product(_of_format(rates.products, work.dtype), *work.sizes)
    if work.kind.startswith("attention"):
        return work.flops * _beyond(_of_format(rates.attention, work.dtype)[work.kind], work.sizes[2])
    curves = _of_format(rates.moved, work.dtype)
    return at(curves[work.kind], work.sizes[0])


def _of_format(tables: Mapping[str, Any], dtype: str) -> Any:
    """A format that was not measured (integers, booleans) moves as fp32 does."""
    return tables.get(dtype) or tables["float32"]


def _beyond(curve: Curve, size: float) -> float:
    """Of a rate: constant beyond both ends."""
    return at(curve, min(size, curve[-1][0]))


def _product(table: Mapping[str, float], matrices: int, m: int, n: int, k: int) -> float:
    """Between measured shapes along each side's logarithm: seconds a FLOP are what varies slowly."""
    measured = {tuple(map(int, name.split("x"))): seconds for name, seconds in table.items()}
    sides = sorted({side for shape in measured for side in shape})
    total = weight = 0.0
    for shape, seconds in measured.items():
        # Trilinear in the logarithms; corners that were too large to measure leave their share to the others.
        share = math.prod(_hat(sides, side, corner) for side, corner in zip((m, n, k), shape, strict=True))
        total += share * math.log(seconds / math.prod(shape))
        weight += share
    if not weight:
        nearest = min(measured, key=lambda s: sum(abs(math.log(a / b)) for a, b in zip(s, (m, n, k), strict=True)))
        total, weight = math.log(measured[nearest] / math.prod(nearest)), 1.0
    return matrices * m * n * k * math.exp(total / weight)


def _hat(sides: list[int], side: float, corner: int) -> float:
    """1 at `corner`, 0 at its neighbours on the grid, in between by logarithms."""
    side = min(max(side, sides[0]), sides[-1])
    i = sides.index(corner)
    if side <= corner:
        if i == 0:
            return 1.0
        return max(0.0, 1 - math.log(corner / side) / math.log(corner / sides[i - 1]))
    if i == len(sides) - 1:
        return 1.0
    return max(0.0, 1 - math.log(side / corner) / math.log(sides[i + 1] / corner))


def _collective(rates: Rates, collective: Collective) -> float:
    curves = rates.collectives
    if not curves:
        return 0.0
    curve = curves.get(collective.kind) or curves["all-gather"]
    return at(curve, collective.size_bytes)
