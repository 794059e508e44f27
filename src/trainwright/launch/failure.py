"""The first failure of a launch, in words: which rank, what, where its log is. Said once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_TAIL_LINES = 20
# What Gloo, NCCL and the store say on a rank when another one has ended.
_PEER_IS_GONE = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "pair closure",
    "Socket closed",
    "failed to recv",
    "Timed out",
    "timed out",
    "timeout",
    "ncclRemoteError",
    "ncclSystemError",
)


def describe_failure(failures: Mapping[int, ProcessFailure], log_dir: Path, oom_kills_seen: int = 0) -> str:
    """What to tell the user. failures: by global rank. oom_kills_seen: what the kernel killed for memory meanwhile."""
    if not failures:
        return f"the launcher ended without a result; its messages are in {log_dir / 'launcher.log'}"
    rank = _first(failures)
    failure = failures[rank]
    extra = _extra(failure)
    log = log_dir / f"rank-{rank}.log"
    lines = [f"rank {rank} failed first ({_how(failure)})"]
    if extra.get("deliberate"):  # says itself what, why and what to do
        return f"{str(extra['text']).rstrip()}\n  where:  rank {rank}; logs: {log_dir}"
    others = sorted(set(failures) - {rank})
    if others:
        lines[0] += f"; {'ranks' if len(others) > 1 else 'rank'} {_ranges(others)} ended after it"
    if extra:
        lines.append(str(extra["py_callstack"]).rstrip())
    elif failure.exitcode == -signal.SIGKILL and oom_kills_seen > 0:
        lines.append("the kernel's out-of-memory killer ended it: this machine or container has too little memory")
        lines.append("  remedy: a smaller batch.micro_size, a higher zero.stage, or more memory")
    elif failure.exitcode == -signal.SIGKILL:
        lines.append("something killed it (SIGKILL): often the out-of-memory killer or a scheduler")
    elif rank != 0:
        lines.append(_tail(log))
    else:
        lines.append("it left no traceback; what it said is above")
    lines.append(f"logs: {log_dir}")
    return "\n".join(line for line in lines if line)


def oom_kills() -> int:
    """Processes of this container that the kernel killed for memory so far (cgroup v2); 0 where it is not known."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def _first(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank whose failure is the cause: by kind first, then by time.

    Errors of a rank's own come before a death without an error file (killed, crashed), that before errors which only
    say that another rank is gone, and last those that the agent ended with SIGTERM.
    """

    def key(rank: int) -> tuple[int, float, int]:
        failure = failures[rank]
        extra = _extra(failure)
        time_s = float(extra.get("time_s", failure.timestamp))
        if extra:
            lost = any(phrase in str(extra.get("text", "")) for phrase in _PEER_IS_GONE)
            return (2 if lost else 0), time_s, rank
        return (3 if failure.exitcode == -signal.SIGTERM else 1), time_s, rank

    return min(failures, key=key)


def _extra(failure: ProcessFailure) -> dict[str, Any]:
    message = failure.error_file_data.get("message")
    return dict(message.get("extraInfo", {})) if isinstance(message, dict) else {}


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"ended by {failure.signal_name()}"
    return f"exit code {failure.exitcode}"


def _ranges(ranks: list[int]) -> str:
    """[1, 2, 3, 5] as "1-3, 5"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _tail(log: Path) -> str:
    """The last lines of a rank's log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])
