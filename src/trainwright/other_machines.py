"""Whether this process plans for other machines than its own: it then computes and exchanges as GPUs do, not as its CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_planned_for = False


def planned_for() -> bool:
    """Whether it does."""
    return _planned_for


@contextmanager
def as_on_any_machine() -> Iterator[None]:
    """Inside it products are made in the operands' format, whatever this processor lacks (fused/linear.py), and gradients
    sent in the reduction's (exchange.py)."""
    global _planned_for
    before, _planned_for = _planned_for, True
    try:
        yield
    finally:
        _planned_for = before
