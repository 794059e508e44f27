"""One run folder, one run at a time: two that write the same metrics and checkpoints would ruin both."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from trainwright import distributed
from trainwright.errors import ConfigError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Holds `run_dir` for this job: rank 0 locks a file in it, which the system releases with the process, however it
    ends. Collective. Raises ConfigError, on every rank, naming the process that holds the folder.

    Where the file system has no locks, the run goes on without one.
    """
    file: IO[str] | None = None
    problem: str | None = None
    if distributed.is_main():
        file, problem = _lock(run_dir / LOCK_NAME)
    problem = distributed.from_main(problem)
    if problem is not None:
        raise ConfigError(
            f"run_dir={run_dir} is in use: {problem}",
            "a run folder belongs to one run at a time",
            "wait for it or stop it (Ctrl-C saves), or take another run_dir",
        )
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _lock(path: Path) -> tuple[IO[str] | None, str | None]:
    """(the open, locked file, None), or (None, who holds it)."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None, None
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "by another process"
        file.close()
        return None, holder
    except OSError:
        file.close()
        return None, None
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {distributed.host()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file, None
