"""Pipeline schedules as data: which rank holds which part, and how long the ranks idle when the recorded actions are
replayed with unit costs.

Legend: P ranks, v parts a rank, n micro-batches; F forward, B backward, I its half for the inputs, W that for the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from trainwright.config.schema import ParallelConfig

INTERLEAVED = frozenset({"interleaved_1f1b", "zero_bubble", "zbv"})
SPLIT_BACKWARD = frozenset({"zero_bubble", "zbv"})
"""Schedules that part a backward into I and W."""


def parts_a_rank(settings: ParallelConfig) -> int:
    """v."""
    return (settings.virtual_stages or 2) if settings.pipeline_schedule in INTERLEAVED else 1


def part_count(settings: ParallelConfig) -> int:
    """P v."""
    return settings.pipeline * parts_a_rank(settings)


def rank_of_part(part: int, settings: ParallelConfig) -> int:
    """The pipeline rank that holds `part`."""
    return holder(part, settings.pipeline, settings.pipeline_schedule)


def holder(part: int, ranks: int, schedule: str) -> int:
    """The same: round and round, or there and back under zbv."""
    return 2 * ranks - 1 - part if schedule == "zbv" and part >= ranks else part % ranks


def parts_of_rank(rank: int, settings: ParallelConfig) -> list[int]:
    """Parts of a pipeline rank, ascending."""
    return [part for part in range(part_count(settings)) if rank_of_part(part, settings) == rank]


class Action(NamedTuple):
    """One computation of a rank: kind F, B, I or W."""

    kind: str
    part: int
    micro_batch: int


UNIT_COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
Orders = Mapping[int, Sequence[Action]]
"""The actions of each pipeline rank, in its order."""


class Replay(NamedTuple):
    """time: until the last rank has ended. idle: share of the ranks' time in which they wait. held: by rank, the most
    micro-batches (counted once a part) between forward and the end of their backward. busy: by rank, how long it computes."""

    time: float
    idle: float
    held: list[int]
    busy: list[float]


def replay(orders: Orders, cost: Callable[[Action], float] | None = None, passing: float = 0.0) -> Replay:
    """Runs the ranks' actions in their order, each as soon as what it needs is there.

    cost: how long an action takes; by default `UNIT_COSTS` of its kind. passing: how long a result is on its way to another rank's
    part.

    A forward needs that of the part before, a backward (B or I) that of the part behind and its own forward, W its I.
    Raises AssertionError where the orders cannot be run.
    """
    takes = cost or (lambda action: UNIT_COSTS[action.kind])
    rank_of = {action.part: rank for rank, actions in orders.items() for action in actions}
    last = max(action.part for actions in orders.values() for action in actions)
    end: dict[Action, float] = {}
    free = dict.fromkeys(orders, 0.0)
    following = dict.fromkeys(orders, 0)
    while any(following[rank] < len(orders[rank]) for rank in orders):
        progress = False
        for rank, actions in orders.items():
            while following[rank] < len(actions):
                action = actions[following[rank]]
                ready = [_end_of(end, need) for need in _needs(action, last)]
                if any(ended is None for ended in ready):
                    break
                far = [passing if rank_of[need[0].part] != rank else 0.0 for need in _needs(action, last)]
                came = [ended + way for ended, way in zip(ready, far, strict=True) if ended is not None]
                end[action] = free[rank] = max([free[rank], *came]) + takes(action)
                following[rank] += 1
                progress = True
        assert progress, "the actions wait for each other"
    time = max(free.values())
    busy = [sum(takes(action) for action in orders[rank]) for rank in sorted(orders)]
    held = [_most_held(orders[rank]) for rank in sorted(orders)]
    return Replay(time, 1.0 - sum(busy) / (time * len(orders)), held, busy)


def _needs(action: Action, last: int) -> list[list[Action]]:
    """Actions that must have ended, each as alternatives."""
    kind, part, index = action
    if kind == "F":
        return [[Action("F", part - 1, index)]] if part else []
    if kind == "W":
        return [[Action("I", part, index)]]
    behind = [[Action("B", part + 1, index), Action("I", part + 1, index)]] if part < last else []
    return [[Action("F", part, index)], *behind]


def _end_of(end: Mapping[Action, float], alternatives: Sequence[Action]) -> float | None:
    return next((end[action] for action in alternatives if action in end), None)


def _most_held(actions: Sequence[Action]) -> int:
    held = most = 0
    for action in actions:
        held += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind]
        most = max(most, held)
    return most


def idle_formula(settings: ParallelConfig, micro_batches: int) -> float:
    """The schedule's idle share at unit costs (F = I = W = 1, B = 2), n >= P and P dividing n (zbv: n >= 2P - 1).

    (P-1) / (n+P-1): GPipe, arXiv 1811.06965; 1F1B idles as long. (P-1) / (vn+P-1): interleaved, 2104.04473 section 2.2.
    (P-1) / (3vn+P-1): zero bubble, 2401.10241: the ranks wait for the first forward to arrive, W fills the rest; the
    V form likewise with v = 2.
    """
    ranks, parts = settings.pipeline, parts_a_rank(settings)
    if settings.pipeline_schedule in SPLIT_BACKWARD:
        return (ranks - 1) / (3 * parts * micro_batches + ranks - 1)
    return (ranks - 1) / (parts * micro_batches + ranks - 1)
