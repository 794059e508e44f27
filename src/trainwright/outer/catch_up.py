"""What a group that comes back has missed: a snapshot on its way, and the outer steps heard since it was taken."""

from __future__ import annotations

import torch

from trainwright import distributed
from trainwright.errors import CheckpointError
from trainwright.outer.link import Meeting, Outcome
from trainwright.outer.state import OuterState
from trainwright.outer.transport import Download


class Missed:
    """Collects until everything is there. All ranks of the group come to the same verdict at the same time.

    steps: the horizon of the run. A group that comes back while the others average for the last time hears them out.
    """

    def __init__(self, steps: int | None) -> None:
        self._steps = steps
        self._download: Download | None = None
        self._heard: list[Outcome] = []
        self.failed = False
        """The snapshot will never be there."""

    def add(self, found: Outcome | Meeting) -> bool:
        """Takes what was heard; whether nothing is missing. Collective.

        Raises CheckpointError where the groups that this one could catch up from are gone.
        """
        if found.download is not None:  # a new snapshot, of the state before this outer step
            self._download, self._heard = found.download, []
        if isinstance(found, Outcome):
            self._heard.append(found)
        last_ones = isinstance(found, Outcome) and self._steps is not None and found.step >= self._steps
        return self._snapshot_is_there(found) and not last_ones

    def _snapshot_is_there(self, found: Outcome | Meeting) -> bool:
        self.failed = False
        if self._download is None:  # nothing was missed but what is heard from here on
            return True
        missing, failed = distributed.agree_max_of(
            [float(not self._download.done), float(self._download.failed is not None)], torch.device("cpu")
        )
        self.failed = bool(failed)
        if failed and isinstance(found, Meeting) and found.download is None:
            raise CheckpointError(
                f"no weights from another group: {self._download.failed}",
                "a group that is behind catches up from one that runs",
                "the same command again: with no other group running it goes on from its own checkpoint",
            )
        return not missing

    def make_up(self, state: OuterState) -> None:
        """Puts the snapshot, and the outer steps after it, in the place of `state`. Collective."""
        if self._download is not None:
            state.take_snapshot(self._download.result())
        for outcome in self._heard:
            state.step(outcome.fragment, state.whole(state.fragments[outcome.fragment], outcome.mean))
            state.cursors |= outcome.cursors
