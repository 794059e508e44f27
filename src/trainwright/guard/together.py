"""Something that each rank does by itself, with one outcome: a failure on one machine is the same error on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from trainwright import distributed
from trainwright.errors import TrainwrightError
from trainwright.ledger import here

__all__ = ["together"]

T = TypeVar("T")


def together(action: Callable[[], T], what: str) -> T:
    """`action()` on every rank. Where it raises a TrainwrightError on some, all raise the first of these, naming its rank
    and machine. `what` it is, for the ledger. Collective."""
    if not distributed.several():
        return action()
    value: Any = None
    failure: TrainwrightError | None = None
    try:
        value = action()
    except TrainwrightError as error:
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    here.collective(what.encode())
    dist.all_gather_object(outcomes, None if failure is None else (distributed.host(), failure))
    failed = [(rank, *outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return value
    rank, host, first = failed[0]
    alike = len(failed) == len(outcomes) and len({str(error) for _, _, error in failed}) == 1
    raise type(first)(first.got if alike else f"rank {rank} on {host}: {first.got}", first.rule, first.remedy)
