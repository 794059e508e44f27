"""How the system's scheduler takes threads that only move what others have computed. Imports the standard library alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def behind_computation(wanted: bool = True) -> Iterator[None]:
    """Threads that are started inside wait their turn where every core computes, with their full share: Linux's SCHED_BATCH,
    which new threads inherit (sched(7)). Elsewhere, or where the caller is under another policy than the usual one, nothing.

    For Gloo's threads. One that the kernel lets interrupt the thread which is sending, and so holds the connection's lock,
    asks for that lock again and again until its time is over: tens of thousands of calls of epoll_wait a step, and both
    ranks wait (docs/log.md).
    """
    changed = False
    if wanted and hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox that does not allow it
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                changed = True
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def put_behind_computation(named: str) -> None:
    """The same for this process's threads that run already and have `named` in their names, as the kernel knows them."""
    if not hasattr(os, "SCHED_BATCH"):
        return
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            if (
                named.encode() in (task / "comm").read_bytes()
                and os.sched_getscheduler(int(task.name)) == os.SCHED_OTHER
            ):
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
