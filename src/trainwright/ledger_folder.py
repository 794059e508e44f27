"""The ledgers of a launch's ranks on this machine, as others find them: the launcher, the guard, the next launch."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from trainwright.position import BYTES, Position, decode

_FOLDER = "trainwright-ledger"


def sweep(parent: Path) -> None:
    """Removes the folders of launches whose ranks on this machine are all gone, and their launcher, if it was ours."""
    for folder in parent.glob(f"{_FOLDER}-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            positions = [read(path) for path in folder.glob("*.ledger")]
            if positions and not any(p is None or p.process.runs for p in positions):
                shutil.rmtree(folder, ignore_errors=True)


def read(path: Path) -> Position | None:
    """The ledger of another rank of this machine, also one that has died; None where there is none of this user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return None
        return decode(os.read(descriptor, BYTES + 1))
    finally:
        os.close(descriptor)


def forget_dead(folder: Path) -> None:
    """Removes ledgers of processes that have ended: an earlier start of the same job's."""
    for path in folder.glob("rank-*.ledger"):
        position = read(path)
        if position is not None and not position.process.runs:
            path.unlink(missing_ok=True)


def folder_of(launch: str) -> Path:
    """Where ranks of a launch on this machine keep their ledgers: in memory where the system has such a folder, so that a
    note never waits for a disk. launch: a name that is the launch's own."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"{_FOLDER}-{os.getuid()}-{launch}"


def read_folder(folder: Path) -> list[Position]:
    """The ledgers of a launch's ranks on this machine (and in sight: not those of other containers), by rank."""
    found = [read(path) for path in sorted(folder.glob("rank-*.ledger"))] if folder.is_dir() else []
    return sorted((p for p in found if p is not None and p.process.in_sight), key=lambda p: p.rank)
