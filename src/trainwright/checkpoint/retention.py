"""The run's folder of checkpoints: their names, which are whole, which go. What changes the folder is rank 0's."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from trainwright import storage
from trainwright.checkpoint import folder as folders
from trainwright.checkpoint.folder import ListedCheckpoint, look
from trainwright.checkpoint.manifest import MANIFEST_NAME
from trainwright.errors import CheckpointError

__all__ = ["CheckpointFolder"]

_STEP = re.compile(r"step-(\d{8,})\Z")


class CheckpointFolder:
    """`run_dir/checkpoints`: `step-00000100`, ..., and `best`.

    keep: newest whole checkpoints that stay, 0 for all. keep_every: those at multiples of this step stay for ever,
    0 for none. "Newest" is by the time of the save, so that a run that was set back to an older step goes on from
    what it wrote last.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 0, keep_every: int = 0) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.keep = keep
        self.keep_every = keep_every
        self.protected: frozenset[str] = frozenset()
        """Names of checkpoints that stay whatever the rules say."""

    @property
    def best(self) -> Path:
        """Where the best checkpoint by evaluation lies (it need not exist)."""
        return self.folder / "best"

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` lies or will lie."""
        return self.folder / f"step-{step:08d}"

    def list(self) -> tuple[ListedCheckpoint, ...]:
        """The `step-` checkpoints, whole and damaged, oldest first."""
        if not self.folder.is_dir():
            return ()
        found = [look(path) for path in self.folder.iterdir() if path.is_dir() and _STEP.match(path.name)]
        return tuple(sorted(found, key=_age))

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose manifest is sealed and whose files have their sizes."""
        whole = [checkpoint.path for checkpoint in self.list() if checkpoint.whole]
        return whole[-1] if whole else None

    def clean(self) -> tuple[Path, ...]:
        """Brings back a checkpoint whose replacement was interrupted and deletes what killed saves left behind.

        Rank 0, when no other process writes here (at the start of a run). Returns the folders deleted.
        """
        if not self.folder.is_dir():
            return ()
        deleted = []
        for path, name, _ in tuple(folders.leftovers(self.folder)):
            folders.recover(self.folder / name)
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)
                deleted.append(path)
        return tuple(deleted)

    def prune(self) -> tuple[Path, ...]:
        """Deletes whole checkpoints beyond `keep` and `keep_every`; damaged ones stay to be looked at. Rank 0."""
        if self.keep == 0:
            return ()
        steps = [checkpoint for checkpoint in self.list() if checkpoint.whole]
        deleted = []
        for checkpoint in steps[: -self.keep]:
            step = checkpoint.manifest.step if checkpoint.manifest is not None else 0
            if checkpoint.name in self.protected or (self.keep_every and step % self.keep_every == 0):
                continue
            # Out of sight in one move: a kill while its files go leaves no half checkpoint under a real name.
            doomed = folders.temporary_path(checkpoint.path, "deleting")
            os.rename(checkpoint.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            deleted.append(checkpoint.path)
        return tuple(deleted)

    def keep_as_best(self, path: str | os.PathLike[str]) -> Path:
        """Makes `best` a checkpoint of its own with `path`'s content: hard links where the file system has them,
        so that it costs no space while `path` is there, and stays when `path` is pruned. Rank 0."""
        source = Path(os.path.abspath(path))
        problem = look(source).problem
        if problem is not None:
            raise CheckpointError(f"{source}: {problem}", "the best checkpoint is a whole one", "save it first")
        temporary = folders.temporary_path(self.best, "writing")
        folders.in_progress.add(temporary)
        try:
            temporary.mkdir()
            # The manifest last, as in a save.
            for file in sorted(source.iterdir(), key=lambda file: (file.name == MANIFEST_NAME, file.name)):
                _link_or_copy(file, temporary / file.name)
            storage.fsync_dir(temporary)
            folders.replace_folder(temporary, self.best)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            folders.in_progress.discard(temporary)
        return self.best


def _age(checkpoint: ListedCheckpoint) -> tuple[float, int]:
    match = _STEP.match(checkpoint.name)
    step = int(match[1]) if match is not None else -1
    return (checkpoint.manifest.created.timestamp() if checkpoint.manifest is not None else 0.0, step)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        storage.fsync_file(target)
