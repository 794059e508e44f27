"""Steps that wait for data: which rank, and how much of the time."""

from __future__ import annotations

from collections import deque

_WINDOW, _SHARE, _LEAST_S, _AGAIN = 20, 0.25, 0.5, 500
_RANKS = 2**20


def encoded(wait_s: float, rank: int) -> float:
    """A wait and the rank that had it as one number: the largest over the ranks is the longest wait's. Exact to 1 ms."""
    return float(min(int(wait_s * 1000), 2**31) * _RANKS + rank)


def decoded(value: float) -> tuple[float, int]:
    """(seconds, rank) of `encoded`."""
    milliseconds, rank = divmod(int(value), _RANKS)
    return milliseconds / 1000, rank


class StallDetector:
    """Tells, now and then, that batches come too slowly: where a quarter of the last 20 steps' time was waiting."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=_WINDOW)
        self._quiet = 0

    def push(self, wait_s: float, rank: int, step_time_s: float) -> str | None:
        """Takes a step: the longest wait for its batch over all ranks, whose it was, and the time of the step without it."""
        self._steps.append((wait_s, rank, step_time_s))
        self._quiet = max(0, self._quiet - 1)
        waited_s = sum(wait for wait, _, _ in self._steps)
        whole_s = waited_s + sum(step for _, _, step in self._steps)
        if self._quiet or len(self._steps) < _WINDOW or waited_s < _LEAST_S or waited_s < _SHARE * whole_s:
            return None
        self._quiet = _AGAIN
        ranks = [of for wait, of, _ in self._steps if wait > waited_s / len(self._steps) / 2]
        worst = max(set(ranks), key=ranks.count)
        return (
            f"{waited_s:.1f} s of the last {len(self._steps)} steps' {whole_s:.1f} s were waiting for data, mostly on rank {worst}: "
            "a local copy of the data set, or data.workers=4"
        )
