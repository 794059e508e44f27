"""The first failure of a launch, in words: which rank, what, where its log is. Said once."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StuckError
from ..guard.verdict import GONE, PEER_IS_GONE, TORN, Report, disagreement, places_of
from ..position import Position, of_ranks

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_TAIL_LINES = 20


def describe_failure(
    failures: Mapping[int, ProcessFailure], log_dir: Path, positions: Sequence[Position] = (), oom_kills_seen: int = 0
) -> str:
    """What to tell the user, in at most a screen. failures: by global rank. positions: the ranks' ledgers.
    oom_kills_seen: what the kernel killed for memory meanwhile."""
    if not failures:
        return f"the launcher ended without a result; its messages are in {log_dir / 'launcher.log'}"
    rank = _first(failures)
    failure = failures[rank]
    extra = _extra(failure)
    at = {position.rank: position for position in positions}
    if extra.get("deliberate"):  # says itself what, why and what to do
        return f"{str(extra['text']).rstrip()}\n  where:  {_place(rank, at)}; logs: {log_dir}"
    lines = [_headline(rank, failure, at, oom_kills_seen)]
    others = sorted(set(failures) - {rank})
    if others:
        lines[0] += f"; {of_ranks(others)} ended after it"
    now = time.monotonic()
    reports = {p.rank: Report(p, now - p.since) for p in positions}
    # Collectives that do not match make Gloo abort, or fail with a message about sizes or connections.
    torn = failure.exitcode == -signal.SIGABRT or any(phrase in str(extra.get("text", "")) for phrase in TORN)
    found = disagreement(reports) if torn and len(reports) == len(failures) else None
    if found is not None:
        lines.insert(0, str(StuckError(*found)))
    elif extra:
        lines.append(shortened(str(extra["py_callstack"])))
    elif failure.exitcode == -signal.SIGKILL and oom_kills_seen > 0:
        lines.append(
            "  remedy: a smaller batch.micro_size, a higher zero.stage, offload.optimizer=disk, or more memory"
        )
    elif failure.exitcode == -signal.SIGKILL:
        lines.append("  something killed it: a scheduler, or somebody; the kernel's out-of-memory killer did not")
    else:
        lines.append(_tail(log_dir / f"rank-{rank}.log"))
    if found is None and len(reports) > 1:
        lines += ["where the others were:", *places_of({r: report for r, report in reports.items() if r != rank})]
    lines.append(f"logs: {log_dir}")
    return "\n".join(line for line in lines if line)


def _place(rank: int, at: Mapping[int, Position]) -> str:
    """Such as "rank 1 on node-7 at step 7 in forward of blocks.2"."""
    if rank not in at:
        return f"rank {rank}"
    where = at[rank].describe()
    return f"rank {rank} on {at[rank].host}" + (" at " if where.startswith("step ") else ", ") + where


def may_pass(failures: Mapping[int, ProcessFailure]) -> bool:
    """Whether another start may go better: not where one of our own errors says what has to be changed."""
    if not failures:
        return False
    failure = failures[_first(failures)]
    message = failure.error_file_data.get("message")
    stuck = isinstance(message, dict) and str(message.get("message", "")).startswith("StuckError")
    return stuck or not _extra(failure).get("deliberate")


def _headline(rank: int, failure: ProcessFailure, at: Mapping[int, Position], oom_kills_seen: int) -> str:
    place = _place(rank, at).removeprefix(f"rank {rank}")
    if failure.exitcode >= 0:
        return f"rank {rank} failed first (exit code {failure.exitcode}){place}"
    if failure.exitcode == -signal.SIGKILL and oom_kills_seen > 0:
        return f"rank {rank} was killed by the kernel's out-of-memory killer{place}{_memory(at.get(rank))}"
    return f"rank {rank} died by {failure.signal_name()}{place}"


def _memory(position: Position | None) -> str:
    """What is known of the memory: the rank's, and the container's or the machine's."""
    told = []
    if position is not None and position.peak_bytes:
        told.append(f"it had used {position.peak_bytes / 2**30:.1f} GiB by the end of its last step")
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            told.append(f"the container's limit is {int(limit) / 2**30:.1f} GiB")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal:"))
        told.append(f"the machine has {int(line.split()[1]) / 2**20:.1f} GiB")
    return f" ({'; '.join(told)})" if told else ""


def shortened(stack: str, most: int = 22) -> str:
    """A traceback in at most `most` lines: frames of libraries are counted, not shown; the error's own lines stay."""
    lines = stack.rstrip().splitlines()
    kept: list[str] = []
    hidden, skipping = 0, False
    for line in lines:
        if line.startswith("  File "):
            skipping = "site-packages" in line or "/lib/python" in line or "<frozen" in line
            hidden += skipping
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            if hidden:
                kept.append(f"  ... {hidden} frame(s) of libraries")
                hidden = 0
            kept.append(line[:200])
    if len(kept) > most:
        kept = [*kept[: most // 3], "  ...", *kept[-(most - most // 3 - 1) :]]
    return "\n".join(kept)


def oom_kills() -> int:
    """Processes that the kernel killed for memory so far: of this container (cgroup v2), else of the machine; 0 where it
    is not known."""
    for path, name in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == name:
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
            lost = any(phrase in str(extra.get("text", "")) for phrase in (*PEER_IS_GONE, GONE))
            return (2 if lost else 0), time_s, rank
        return (3 if failure.exitcode == -signal.SIGTERM else 1), time_s, rank

    return min(failures, key=key)


def _extra(failure: ProcessFailure) -> dict[str, Any]:
    message = failure.error_file_data.get("message")
    return dict(message.get("extraInfo", {})) if isinstance(message, dict) else {}


def _tail(log: Path) -> str:
    """The last lines of a rank's log; of a crash's stacks those of the training thread."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = text.splitlines()
    crash = text.rfind("Fatal Python error:")
    if crash >= 0:
        lines = [x for x in text[crash:].splitlines() if not x.startswith("Extension modules:") and not _plumbing(x)]
        return "\n".join([lines[0], *lines[1:][-_TAIL_LINES:]])
    return "\n".join(lines[-_TAIL_LINES:])


def _plumbing(line: str) -> bool:
    """A line of a crash's dump about other threads, or about what started the training thread."""
    others = ("threading.py", "guard/watch.py", "launch/worker.py", "<frozen runpy>", "concurrent/futures")
    return not line or line.startswith("Thread 0x") or any(name in line for name in others)
