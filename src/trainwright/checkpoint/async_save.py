"""Saving in the background: training waits only while this rank's chunks are copied to host memory."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch.distributed as dist

from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.save import CheckpointContent, OnCommit, PlannedSave, Writer, plan_save, write_planned
from trainwright.errors import CheckpointError, UsageError
from trainwright.scheduling import behind_computation

__all__ = ["AsyncSaver"]


class AsyncSaver:
    """Writes checkpoints in a thread, on a Gloo process group of its own; what lands on the disk is `save`'s.

    Its collectives would otherwise meet training's on one group and hang. At most one save is in flight: another
    `save` waits for it first. An error in the background is raised by the next `save`, `wait` or `close`.
    Creating one, `save` and `close` are collective over the group's ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta = timedelta(hours=2),
        writer: Writer = write_planned,
    ) -> None:
        self._writer = writer
        self._own_group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            members = None if group is None else dist.get_process_group_ranks(group)
            with behind_computation():
                self._own_group = dist.new_group(
                    members, timeout=timeout, backend="gloo", use_local_synchronization=members is not None
                )
        self._ranks = Ranks(self._own_group)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = False

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, path: str | os.PathLike[str], content: CheckpointContent, on_commit: OnCommit | None = None) -> None:
        """Plans, copies this rank's chunks to host memory and returns; arguments and errors as those of `save`."""
        if self._closed:
            raise UsageError("AsyncSaver.save() after close()", "a closed saver writes no more", "create a new one")
        self.wait()
        planned = plan_save(path, content, self._ranks)
        planned.stage()
        self._thread = threading.Thread(
            target=self._write, args=(planned, on_commit), name="trainwright-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the save in flight, if any, is whole on the disk. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits, then ends the group. Raises the last save's error. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            if self._own_group is not None and dist.is_initialized():
                dist.destroy_process_group(self._own_group)
            self._own_group = None

    def _write(self, planned: PlannedSave, on_commit: OnCommit | None) -> None:
        try:
            self._writer(planned, self._ranks, on_commit)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # a rank has died: Gloo's own error
            self._error = CheckpointError(
                f"the save of {planned.path} in the background failed: {type(error).__name__}: {error}",
                "all ranks take part in a save",
                "look for the first rank that failed",
            )
        finally:
            planned.chunks = []  # the staged copy
