"""When which fragment is averaged: pure functions of the inner step, so that groups that count alike act alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Each of `fragments` once every `every` inner steps, evenly apart; applied `delay` steps after it is sent."""

    every: int
    fragments: int
    delay: int
    """0: applied at once."""

    def __post_init__(self) -> None:
        assert 0 <= self.delay < max(1, self.every // self.fragments), f"one outer step at a time: {self}"

    def fragment_sent_after(self, step: int) -> int | None:
        """The fragment that is sent after inner step `step` (the first is 1); None: none.

        Number k in the row of all sendings (from 0) comes after step floor((k + 1) every / fragments).
        """
        # The one k with (k+1) every / fragments in [step, step + 1), if there is one.
        k = -(-step * self.fragments // self.every) - 1
        if step < 1 or (k + 1) * self.every // self.fragments != step:
            return None
        return k % self.fragments

    def applied_after(self, sent_after: int) -> int:
        """The inner step after which what was sent after step `sent_after` is applied."""
        return sent_after + self.delay
