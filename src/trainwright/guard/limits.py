"""How long a rank may stand still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainwright.position import Position

_LONG_CALLS = ("initialize", "save", "load", "full_state_dict", "generate", "doctor --net", "outer step")
LEAST_S = 600.0
"""Of the adaptive limit: NCCL's own."""


@dataclass(frozen=True)
class Limits:
    """How long is too long, in seconds."""

    disagree_s: float = 5.0
    """Before ranks that may be in different places compare them."""
    wait_s: float | None = None
    """Without progress; None: from the steps' own times."""
    first_wait_s: float = 1800.0
    """The same until the second step, in calls that read or write much, and for ranks that are outside the engine."""

    def of(self, position: Position) -> float:
        """For a rank that stands here."""
        if position.steps_done < 2 or position.call in _LONG_CALLS:
            return max(self.first_wait_s, self.wait_s or 0.0)
        return self.wait_s if self.wait_s is not None else max(LEAST_S, 10.0 * position.slowest_step_s)


@dataclass(frozen=True)
class _Widest(Limits):
    parts: tuple[Limits, ...] = ()

    def of(self, position: Position) -> float:
        return max(part.of(position) for part in self.parts)


def of_several(limits: Sequence[Limits]) -> Limits:
    """The widest of several engines' limits, in every place."""
    if len(limits) == 1:
        return limits[0]
    return _Widest(
        max(part.disagree_s for part in limits), None, max(part.first_wait_s for part in limits), tuple(limits)
    )
