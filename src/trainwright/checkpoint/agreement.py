"""What the ranks of a save or a load decide together: an error on one is the same error on all.

Every method is collective over the group and carries failures as data, so that no rank waits for one that has
raised. Only plain data of this same job travels between ranks; nothing here comes from storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from trainwright.errors import CheckpointError, TrainwrightError
from trainwright.ledger import here

__all__ = ["Ranks"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    got: str
    rule: str
    remedy: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        if isinstance(error, TrainwrightError):
            return cls(error.got, error.rule, error.remedy)
        return cls(f"{type(error).__name__}: {error}", "", "")


class Ranks:
    """The ranks of `group` (None: all of them, or this process alone where no group runs)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        running = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if running else 0
        self.size: int = dist.get_world_size(group) if running else 1
        self._first = dist.get_global_rank(group, 0) if running and group is not None else 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def everywhere(self, action: Callable[[], T]) -> list[T]:
        """`action()` on every rank; the results of all, in rank order, on all."""
        outcome = self._attempt(action)
        outcomes: list[Any] = [outcome]
        if self.size > 1:
            outcomes = [None] * self.size
            self._note("all_gather_object")
            dist.all_gather_object(outcomes, outcome, group=self._group)
        self._raise_first(outcomes)
        return outcomes

    def on_first(self, action: Callable[[], T]) -> T:
        """`action()` on rank 0; its result on all."""
        outcome: Any = self._attempt(action) if self.is_first else None
        if self.size > 1:
            box = [outcome]
            self._note("broadcast_object_list")
            dist.broadcast_object_list(box, src=self._first, group=self._group)
            outcome = box[0]
        if isinstance(outcome, _Failure):
            raise CheckpointError(outcome.got, outcome.rule, outcome.remedy)
        return outcome

    def planned(self, local: Callable[[], T], combine: Callable[[list[T]], list[R]]) -> R:
        """`local()` on every rank, `combine` of all of them on rank 0, its r-th result on rank r."""
        outcome = self._attempt(local)
        gathered: list[Any] | None = [outcome]
        if self.size > 1:
            gathered = [None] * self.size if self.is_first else None
            self._note("gather_object")
            dist.gather_object(outcome, gathered, dst=self._first, group=self._group)
        parts: list[Any] | None = None
        if gathered is not None and self.is_first:
            parts = self._combine(gathered, combine)
        mine: list[Any] = [parts[0] if parts is not None else None]
        if self.size > 1:
            self._note("scatter_object_list")
            dist.scatter_object_list(mine, parts, src=self._first, group=self._group)
        if isinstance(mine[0], _Failure):
            raise CheckpointError(mine[0].got, mine[0].rule, mine[0].remedy)
        return mine[0]

    def _combine(self, gathered: list[Any], combine: Callable[[list[T]], list[R]]) -> list[Any]:
        try:
            self._raise_first(gathered)
            return combine(gathered)
        except Exception as error:
            return [_Failure.of(error)] * self.size

    def _note(self, name: str) -> None:
        if self._group is None:  # a group of its own is a background thread's, and the ledger is the training thread's
            here.collective(name.encode())

    def _attempt(self, action: Callable[[], T]) -> T | _Failure:
        try:
            return action()
        except Exception as error:
            return _Failure.of(error)

    def _raise_first(self, outcomes: list[Any]) -> None:
        failures = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)}
        if not failures:
            return
        rank, failure = next(iter(failures.items()))
        others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        # A failure that all ranks share is not any one rank's.
        alike = len(set(failures.values())) == 1 and len(failures) == self.size
        place = "" if alike else f"rank {rank}{others}: "
        raise CheckpointError(f"{place}{failure.got}", failure.rule, failure.remedy)
