"""Which moments can be kept in 8 bits (eight_bit.py). Imports no torch: the planner asks as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCK = 64
"""Values that share a scale."""
_SMALLEST = 4096
"""Values of a parameter whose moments are worth it."""


def takes(shape: Sequence[int]) -> bool:
    """Whether it can be those of a (whole) parameter of this shape: matrices of whole blocks."""
    return len(shape) >= 2 and shape[-1] % BLOCK == 0 and math.prod(shape) >= _SMALLEST
