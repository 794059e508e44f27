"""Loss spikes: a loss far above those of the steps before it, by a measure that one outlier does not move."""

from __future__ import annotations

import math
import statistics
from collections import deque

_WINDOW, _LEAST = 64, 32
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_FLOOR = 0.01


class SpikeDetector:
    """A loss is a spike where it exceeds the median of the last 64 by `factor` deviations.

    The deviation is 1.4826 x the median absolute deviation from the median (a normal distribution's sigma), at least a
    hundredth of the median. Nothing is said before 32 losses are known.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def push(self, loss: float) -> float | None:
        """Takes the loss of a step; by how many deviations it is a spike, or None."""
        found = None
        if self.factor and math.isfinite(loss) and len(self._losses) >= _LEAST:
            median = statistics.median(self._losses)
            deviation = _MAD_TO_SIGMA * statistics.median(abs(x - median) for x in self._losses)
            deviations = (loss - median) / max(deviation, _FLOOR * abs(median), 1e-12)
            found = deviations if deviations > self.factor else None
        if math.isfinite(loss):
            self._losses.append(loss)
        return found

    @property
    def median(self) -> float:
        """Of the losses it remembers, the newest left out."""
        return statistics.median(list(self._losses)[:-1] or [math.nan])

    def state(self) -> list[float]:
        """The losses it remembers."""
        return list(self._losses)

    def load(self, losses: list[float]) -> None:
        """Takes `state` back."""
        self._losses = deque((float(x) for x in losses), maxlen=_WINDOW)
