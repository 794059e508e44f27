"""A checkpoint's folder as a unit: temporary names, the swap into place, the way back, a first look.

Hidden siblings of `step-00000100`, each with a random token:
    .step-00000100.1a2b3c4d.writing     a save in progress, or one that was killed
    .step-00000100.1a2b3c4d.replaced    the checkpoint that a new one of the same name replaces just now
    .step-00000100.1a2b3c4d.deleting    retention deletes it
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainwright import storage
from trainwright.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest_file
from trainwright.errors import CheckpointError

__all__ = [
    "ListedCheckpoint",
    "in_progress",
    "leftovers",
    "locate",
    "look",
    "reached",
    "recover",
    "refuse_foreign",
    "replace_folder",
    "size_problem",
    "temporary_path",
]

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<purpose>writing|replaced|deleting)\Z")

in_progress: set[Path] = set()
"""Temporary folders that this process writes now: nobody may clean them away."""


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint at first sight: its manifest and its files' sizes, not their hashes."""

    path: Path
    manifest: Manifest | None
    problem: str | None
    """Why it is not whole; None if it is."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def whole(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name} (damaged: {self.problem})"


def reached(point: str) -> None:
    """Does nothing. The crash tests put a kill here to prove that every point of a save is safe."""


def temporary_path(path: Path, purpose: str, token: str | None = None) -> Path:
    """A hidden sibling of `path`; purpose: writing, replaced or deleting."""
    return path.with_name(f".{path.name}.{token or secrets.token_hex(4)}.{purpose}")


def leftovers(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """(path, name of the checkpoint, purpose) of the temporary folders that nobody in this process writes."""
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.match(path.name)
        if match is not None and path not in in_progress:
            yield path, match["name"], match["purpose"]


def size_problem(path: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file at first sight: missing, cut short, too long; or None."""
    try:
        size_bytes = os.stat(path / name).st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if size_bytes != entry.size_bytes:
        return f"{name} has {size_bytes:,} of {entry.size_bytes:,} bytes"
    return None


def look(path: Path) -> ListedCheckpoint:
    """The checkpoint at `path` at first sight; never raises."""
    try:
        manifest = read_manifest_file(path)
    except FileNotFoundError:
        return ListedCheckpoint(path, None, f"no {MANIFEST_NAME}")
    except CheckpointError as error:
        return ListedCheckpoint(path, None, error.got)
    except OSError as error:
        return ListedCheckpoint(path, None, str(error))
    problems = [problem for name, entry in manifest.files.items() if (problem := size_problem(path, name, entry))]
    return ListedCheckpoint(path, manifest, "; ".join(problems[:4]) or None)


def refuse_foreign(path: Path) -> None:
    """A save replaces what is at its path: only a folder that holds nothing but a checkpoint's files."""
    if not os.path.lexists(path):
        return
    foreign = [path.name]
    if path.is_dir() and not path.is_symlink():
        foreign = sorted(
            entry.name for entry in path.iterdir() if entry.name != MANIFEST_NAME and entry.suffix != ".safetensors"
        )
    if foreign:
        got = f"{path} exists and holds {', '.join(foreign[:3])}, not a checkpoint"
        raise CheckpointError(got, "a save replaces checkpoints only", f"save to {path / 'step-00000000'} for example")


def replace_folder(temporary: Path, path: Path) -> None:
    """Renames a whole checkpoint to `path`.

    One that is there is moved aside first and deleted afterwards, as no portable call swaps two folders: between the
    two renames `locate` and `recover` find it.
    """
    replaced = None
    if path.exists():
        replaced = temporary_path(path, "replaced")
        os.rename(path, replaced)
        reached("old moved aside")
    try:
        os.rename(temporary, path)
    except OSError:
        if replaced is not None:
            os.rename(replaced, path)
        raise
    storage.fsync_dir(path.parent)
    reached("renamed")
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def locate(path: Path) -> Path:
    """Where the checkpoint `path` is: there, or moved aside by a replacement that was killed halfway."""
    if path.exists() or not path.parent.is_dir():
        return path
    for entry, name, purpose in leftovers(path.parent):
        if name == path.name and purpose == "replaced" and look(entry).whole:
            return entry
    return path


def recover(path: Path) -> None:
    """Undoes a replacement of `path` that was killed halfway. Only when nobody writes there."""
    place = locate(path)
    if place != path:
        os.rename(place, path)
        storage.fsync_dir(path.parent)
