"""A slice of the sequences: what a model has to know when it computes only some of each sequence's tokens.

Token by token nothing changes but the position; attention reaches beyond the slice. Who cuts the sequences says how
(`attention`); the models call it and know nothing of ranks. B batch, T tokens of a sequence, H heads, E head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(q [B, H, T, E], k and v [B, G, S, E], mask [B or 1, 1, T or 1, S] bool or None) -> [B, H, T, E]. Of whole sequences, the mask
may be a `DocumentBlocks`."""


@dataclass(frozen=True, eq=False)
class SequenceSlice:
    """Which tokens of each sequence the module is given: `first` and those after it, in order.

    length: T, tokens of a whole sequence. padded_length: the same with the fill-up tokens at the end; keys and masks
    cover it. valid: [B, padded_length] bool, False for tokens that nobody sees; None: all but the fill-up.
    document_ids: [B, padded_length], or None. attention: makes of an attention over whole sequences one over slices;
    the mask that goes in is [B or 1, 1, padded_length or 1, padded_length].
    """

    first: int
    length: int
    padded_length: int
    valid: Tensor | None
    document_ids: Tensor | None
    attention: Callable[[Attend], Attend]


_active: ContextVar[SequenceSlice | None] = ContextVar("trainwright_sequence_slice", default=None)


def active_slice() -> SequenceSlice | None:
    """The slice that the inputs of a forward under way are; None for whole sequences."""
    return _active.get()


@contextlib.contextmanager
def sequence_slice(place: SequenceSlice | None) -> Iterator[None]:
    """Every forward inside is given slices of sequences."""
    token = _active.set(place)
    try:
        yield
    finally:
        _active.reset(token)
