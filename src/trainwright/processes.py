"""Is a process that somebody wrote down still the one that runs? Numbers of processes are used again, and containers
count their own. Imports the standard library alone."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine: its number, in which namespace, and when it began (clock ticks since the boot; the last
    two are 0 where the system does not tell)."""

    pid: int
    namespace: int
    start: int

    @staticmethod
    def own() -> ProcessId:
        """Of this process."""
        return ProcessId(os.getpid(), _namespace(), _stat(os.getpid())[1])

    @property
    def in_sight(self) -> bool:
        """Whether the number means the same here."""
        return self.namespace == _namespace()

    @property
    def runs(self) -> bool:
        """Whether it has not ended. What is out of sight is taken to run."""
        if not self.in_sight:
            return True
        if not self.start:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 0)
                return True
            return False
        state, start = _stat(self.pid)
        return start == self.start and state not in ("Z", "X")

    def kill(self, number: int) -> None:
        """Sends a signal, if it is certain whom it would reach."""
        if self.in_sight and self.start and self.runs:
            with contextlib.suppress(OSError):
                os.kill(self.pid, number)


def _namespace() -> int:
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def _stat(pid: int) -> tuple[str, int]:
    """(state, start in clock ticks) from /proc; ("", 0) where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0
