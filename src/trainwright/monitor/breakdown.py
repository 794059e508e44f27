"""Where the time of traced steps went, from intervals of what ran.

Every moment of a step is counted once: as compute where any operator or kernel computes, else as communication that is
exposed, else as waiting for data, else as the host's own work (Python, launches, bookkeeping). Communication that runs beside
compute is hidden, and told apart from the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.phases import BACKWARD, DATA, FORWARD, GRAPH, PREFIX, STEP, UPDATE

Span = tuple[float, float]
_COMMUNICATION = ("gloo:", "c10d::", "_c10d_functional::", "nccl", "record_param_comms")
_COMPUTE = ("aten::", "## Call CompiledFxGraph", "fsdp::", "triton_", "_fused")


@dataclass(frozen=True)
class Event:
    """Something that ran: times in microseconds; `device` is "cpu" or an accelerator's kind."""

    name: str
    start: float
    end: float
    device: str = "cpu"


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds a step, the mean over the traced ones; `parts` add up to `step_ms`."""

    steps: int
    step_ms: float
    parts: tuple[tuple[str, float], ...]
    hidden_communication_ms: float
    operators: tuple[tuple[str, float, int], ...]
    """(name, milliseconds of its own a step, calls a step), the dearest first."""

    def as_dict(self) -> dict[str, Any]:
        """For profile.json."""
        return {
            "steps": self.steps, "step_ms": self.step_ms, "hidden_communication_ms": self.hidden_communication_ms,
            "parts": [{"name": name, "ms": ms} for name, ms in self.parts],
            "operators": [{"name": name, "ms": ms, "calls": calls} for name, ms, calls in self.operators],
        }  # fmt: skip


def break_down(events: Sequence[Event], operators: Sequence[tuple[str, float, int]] = ()) -> Breakdown:
    """The breakdown of the steps marked in `events`."""
    steps = union(_spans(events, STEP))
    count = max(1, len([e for e in events if e.name == PREFIX + STEP and e.device == "cpu"]))
    kernels = [e for e in events if e.device != "cpu" and not e.name.startswith(PREFIX)]
    at_work = kernels or [e for e in events if not e.name.startswith(PREFIX)]
    computing = union((e.start, e.end) for e in at_work if _computes(e, bool(kernels)))
    talking = union((e.start, e.end) for e in at_work if _talks(e))
    compute, communication = common(computing, steps), common(talking, steps)
    exposed = without(communication, compute)
    data = without(without(common(union(_spans(events, DATA)), steps), compute), communication)
    captured = any(e.name == PREFIX + GRAPH for e in events)
    names = (*((GRAPH,) if captured else ()), FORWARD, BACKWARD, UPDATE)
    phases = {name: union(_spans(events, name, on_device=bool(kernels))) for name in names}
    parts = [(f"{name}: compute", length(common(compute, spans))) for name, spans in phases.items()]
    parts.append(("other compute", length(compute) - sum(ms for _, ms in parts)))
    parts += [("communication, exposed", length(exposed)), ("waiting for data", length(data))]
    parts.append(("host", length(steps) - sum(ms for _, ms in parts)))
    scale = 1e-3 / count
    return Breakdown(
        count,
        length(steps) * scale,
        tuple((name, max(0.0, us * scale)) for name, us in parts),
        (length(communication) - length(exposed)) * scale,
        tuple((name, us * scale, round(calls / count)) for name, us, calls in operators),
    )


def _spans(events: Iterable[Event], name: str, on_device: bool = False) -> list[Span]:
    """Of a phase; on accelerators the span of its kernels, which run later than the host's marks."""
    found = [e for e in events if e.name == PREFIX + name]
    on = [e for e in found if (e.device != "cpu") == on_device] or found
    return [(e.start, e.end) for e in on]


def _talks(event: Event) -> bool:
    return event.name.startswith(_COMMUNICATION)


def _computes(event: Event, kernel: bool) -> bool:
    return not _talks(event) and (kernel or event.name.startswith(_COMPUTE))


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans in order that cover the same moments."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def common(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """Moments in both; each in order and disjoint."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """Moments of `a` that are not in `b`."""
    found: list[Span] = []
    j = 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        at, k = start, j
        while k < len(b) and b[k][0] < end:
            if b[k][0] > at:
                found.append((at, b[k][0]))
            at = max(at, b[k][1])
            k += 1
        if at < end:
            found.append((at, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """Total of disjoint spans."""
    return sum(end - start for start, end in spans)
