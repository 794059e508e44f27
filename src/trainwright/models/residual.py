"""The residual stream cut along the sequence: what a model has to know where others hold the rest of it.

Who cuts a model's matrices fills `Transformer.residual_cut`; the models call it and know nothing of ranks.
B batch, T sequence, S positions of the slice, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class ResidualSlice(Protocol):
    """The slice of one forward."""

    @property
    def first(self) -> int:
        """Place in the given sequence of the slice's first position."""

    def whole(self, x: Tensor) -> Tensor:
        """[B, S, D] of the slice -> [B, T, D], for what follows to make its part of the work of."""


ResidualCut = Callable[[int], ResidualSlice]
"""T, positions of the given sequence -> the slice of it."""
