"""The bytes of a step over its operators, in so many points that a picture can show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

_POINTS = 240


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a run of operators."""

    phase: str
    """forward, backward or update."""
    total_bytes: int
    by_kind: Mapping[str, int]
    """A key of `live_bytes.KINDS` -> bytes."""


@dataclass
class Timeline:
    """Moments at even distances in operators, and one at least for each run of a phase: twice `_POINTS` and as many as there are
    phases at the most."""

    moments: list[Moment] = field(default_factory=list)
    _each: int = 1
    """Operators of a moment."""
    _here: int = 0
    """Of the last one."""

    def note(self, phase: str, total_bytes: int, by_kind: Counter[str]) -> None:
        """What is held now."""
        if not self.moments or self._here >= self._each or self.moments[-1].phase != phase:
            self.moments.append(Moment(phase, total_bytes, by_kind.copy()))
            self._here = 0
        elif total_bytes > self.moments[-1].total_bytes:
            self.moments[-1] = Moment(phase, total_bytes, by_kind.copy())

    def tick(self, phase: str, total_bytes: int, by_kind: Counter[str]) -> None:
        """An operator has run, and this is held."""
        self.note(phase, total_bytes, by_kind)
        self._here += 1
        if self._here == self._each and len(self.moments) >= 2 * _POINTS:
            self.moments = list(_halved(self.moments))
            self._each *= 2

    def end(self, known: Mapping[str, str]) -> None:
        """What follows the last backward belongs to the update: the gradients' norm, the clipping. known: kind -> what it was."""
        self.moments = [replace(moment, by_kind=_renamed(moment.by_kind, known)) for moment in self.moments]
        last = max(
            (i for i, moment in enumerate(self.moments) if moment.phase == "backward"), default=len(self.moments)
        )
        self.moments[last + 1 :] = [replace(moment, phase="update") for moment in self.moments[last + 1 :]]


def _renamed(by_kind: Mapping[str, int], names: Mapping[str, str]) -> Mapping[str, int]:
    found: Counter[str] = Counter()
    for kind, size in by_kind.items():
        found[names.get(kind, kind)] += size
    return found


def _halved(moments: list[Moment]) -> Iterator[Moment]:
    """The fuller of each two neighbours of one phase."""
    waiting: Moment | None = None
    for moment in moments:
        if waiting is None:
            waiting = moment
        elif waiting.phase == moment.phase:
            yield max(waiting, moment, key=lambda m: m.total_bytes)
            waiting = None
        else:
            yield waiting
            waiting = moment
    if waiting is not None:
        yield waiting
