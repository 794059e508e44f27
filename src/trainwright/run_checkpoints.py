"""The checkpoints of a run: when one is written, how (in the background or not), which are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwright import distributed
from trainwright.checkpoint.async_save import AsyncSaver
from trainwright.checkpoint.folder import look
from trainwright.checkpoint.retention import CheckpointFolder, ResumePoint
from trainwright.checkpoint.save import save
from trainwright.config.schema import CheckpointConfig
from trainwright.engine import Engine
from trainwright.ledger import here
from trainwright.snapshot import content_of


class RunCheckpoints:
    """Saves of one run. Every method is collective."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.folder = CheckpointFolder(run_dir / "checkpoints", config.keep, config.keep_every)
        self._resume = config.resume
        self._saver = AsyncSaver() if config.asynchronous else None
        self._last_step: int | None = None

    def resume_point(self) -> ResumePoint | None:
        """Where `checkpoint.resume` says to go on from; None for a fresh start."""
        with here.call("load"):
            return self.folder.resolve(self._resume)

    def resumed_at(self, step: int) -> None:
        """A resume has just loaded this step's checkpoint."""
        self._last_step = step

    def save(
        self,
        engine: Engine,
        state: Callable[[], dict[str, Any]],
        tensors: Callable[[], Mapping[str, Tensor]] = dict,
        best: bool = False,
    ) -> Path | None:
        """Writes the checkpoint of this step, with the loop's `state` and `tensors`; None where this step has one already."""
        path = self.folder.path_of(engine.global_step)
        if engine.global_step == self._last_step and not best:
            return None
        self._last_step = engine.global_step
        with here.call("save", engine.global_step):
            content = content_of(engine, state(), tensors())
            on_commit = self._on_commit(best)
            if self._saver is not None:
                self._saver.save(path, content, on_commit)
            else:
                save(path, content, on_commit=on_commit)
        return path

    def _on_commit(self, best: bool) -> Callable[[Path], None]:
        def commit(path: Path) -> None:
            if best:
                self.folder.keep_as_best(path)
            self.folder.prune()

        return commit

    def wait(self) -> None:
        """Returns when the save in flight is whole on disk; raises its error."""
        if self._saver is not None:
            with here.call("save"):
                self._saver.wait()

    def close(self) -> None:
        """Ends the background writer."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None


def newest(run_dir: Path) -> Path | None:
    """The best (if kept) or else the newest whole checkpoint of a run, the same on all ranks."""
    folder = CheckpointFolder(run_dir / "checkpoints")
    found = None
    if distributed.is_main():
        found = folder.best if folder.best.is_dir() and look(folder.best).whole else folder.newest_whole()
    return distributed.from_main(found)
