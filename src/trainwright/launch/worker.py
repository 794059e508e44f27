"""A rank's process: `python -m trainwright.launch.worker MODULE:FUNCTION ARGUMENTS...`.

Before anything slow is imported it ties its life to the launcher's and, but for rank 0, turns its output to
`logs/rank-N.log`. An exception becomes an error file (the format of torch's elastic agent) from which the launcher
reports the first failure, once; the rank itself prints nothing to the console.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..error_file import record_failure
from .signals import die_with_parent

LAUNCHER_PID = "TRAINWRIGHT_LAUNCHER_PID"
LOG_DIR = "TRAINWRIGHT_LOG_DIR"


def is_worker() -> bool:
    """This process is a rank that `launch_local` started: errors must be raised, not printed (the launcher does)."""
    return LAUNCHER_PID in os.environ


def resolve(entry: str) -> Callable[[list[str]], object]:
    """The function behind `package.module:function`. It takes the argument list and may return an exit code."""
    module, _, name = entry.partition(":")
    function: Callable[[list[str]], object] = getattr(importlib.import_module(module), name)
    return function


def redirect_output(path: Path) -> None:
    """Appends everything that this process, its libraries and its children write to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def main(arguments: list[str]) -> NoReturn:
    """Runs the entry; exits with its code, or 1 after recording its exception."""
    parent = os.environ.get(LAUNCHER_PID)
    die_with_parent(int(parent) if parent else None)
    rank = int(os.environ.get("RANK", "0"))
    log_dir = os.environ.get(LOG_DIR)
    if log_dir and rank != 0:
        redirect_output(Path(log_dir) / f"rank-{rank}.log")
    if log_dir:  # of rank 0 too: the console belongs to the launcher's report
        crash_log = (Path(log_dir) / f"rank-{rank}.log").open("a", encoding="utf-8")
        faulthandler.enable(crash_log)
    else:
        faulthandler.enable()
    code: object = 0
    try:
        code = resolve(arguments[0])(arguments[1:])
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            record_failure(ended)
            code = 1
    except BaseException as error:
        record_failure(error)
        if log_dir and rank == 0:  # the console belongs to the launcher's report
            with (Path(log_dir) / "rank-0.log").open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        else:
            traceback.print_exc()
        code = 1
        distributed = sys.modules.get("trainwright.distributed")
        if distributed is not None:
            distributed.shutdown(orderly=False)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
