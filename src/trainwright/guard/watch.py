"""The watchdog: a thread of every rank that notices when ranks wait for each other in vain, says who and where, and ends.

Each has a store client of its own (a blocking call of another's would hold it up). A rank whose ledger stands still
longer than it should calls a hearing: every rank posts its position and the stack of its training thread, the one that
called decides (`verdict.py`), all act on it. Nothing is sent while all is well, but one look at the store a period.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainwright import distributed, ledger
from trainwright.errors import StuckError
from trainwright.guard.error_file import record_failure
from trainwright.guard.verdict import Report, disagreement, judge, places_of
from trainwright.ledger import here
from trainwright.position import Position

PERIOD_S = 0.25
_GONE_S = 2.0
"""A rank that waits so long looks whether the others of this machine live; a launcher that is ours will be faster."""
_ANSWER_S = 3.0
"""How long a hearing waits for answers."""
_LONG_CALLS = ("save", "load", "full_state_dict", "generate")
_DOC = "  see:    docs/faults.md"


@dataclass(frozen=True)
class Limits:
    """How long is too long, in seconds."""

    disagree_s: float = 5.0
    """Before ranks that may be in different places compare them."""
    wait_s: float | None = None
    """Without progress; None: from the steps' own times."""
    first_wait_s: float = 1800.0
    """The same until the second step, and in calls that read or write much."""

    def of(self, position: Position) -> float:
        """For a rank that stands here."""
        if position.steps_done < 2 or position.call in _LONG_CALLS:
            return max(self.first_wait_s, self.wait_s or 0.0)
        return self.wait_s if self.wait_s is not None else max(300.0, 10.0 * position.slowest_step_s)


class Watch:
    """Runs from `start` to `stop`. One for a process group, whatever the number of engines."""

    def __init__(self, store: Any, rank: int, size: int, limits: Limits) -> None:
        self._store = dist.PrefixStore(  # type: ignore[attr-defined]
            "trainwright/guard", store.clone()
        )
        self._rank, self._size = rank, size
        self.limits = limits
        self._period_s = max(PERIOD_S, size / 4000)  # a look each of very many ranks is work for one store
        self._training_thread = threading.get_ident()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stopping = threading.Event()
        self._round = 0
        self._asked = -1
        self._thread = threading.Thread(target=self._run, name="trainwright-watch", daemon=True)

    def start(self) -> None:
        """From now on."""
        here.explain = self.explain
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; before the store goes."""
        here.explain = None
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        # The store is gone when its host has ended: nobody is left to agree with, and collectives fail by themselves.
        with contextlib.suppress(RuntimeError):
            while not self._stopping.wait(self._period_s):
                self._look()

    def _look(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:  # kill -9 of torchrun leaves its ranks alone
            print("the launcher is gone: this rank ends", file=sys.stderr, flush=True)
            os._exit(1)
        alarm = f"alarm/{self._round}"
        if not self._store.check([alarm]):
            position = here.position()
            waited_s = time.monotonic() - position.since
            if waited_s > self.limits.of(position):
                kind = "limit"
            elif waited_s > _GONE_S and position.notes != self._asked and any(_gone(p) for p in _neighbours()):
                kind, self._asked = "gone", position.notes
            elif waited_s > self.limits.disagree_s and position.notes != self._asked:
                kind, self._asked = "asks", position.notes
            else:
                return
            self._store.compare_set(alarm, "", f"{kind} {self._rank}")
        self._hearing(*self._store.get(alarm).decode().split())

    def _hearing(self, kind: str, chair: str) -> None:
        self._store.set(f"{self._round}/at/{self._rank}", json.dumps(_encoded(self._report())))
        key = f"{self._round}/verdict"
        if int(chair) == self._rank:
            reports = self._reports()
            found = judge(
                reports,
                self._size,
                limit_reached=kind == "limit",
                disagree_s=self.limits.disagree_s,
            )
            if found is not None:
                record_failure(StuckError(*found), stack="")
            self._store.set(key, json.dumps(found))
            if found is not None:
                for report in reports.values():
                    if not report.answers and not report.gone:  # it would not end by itself
                        os.kill(report.position.pid, signal.SIGKILL)
                self._end(StuckError(*found), speak=True)
        else:
            found = json.loads(self._await(key) or "null")
            if found is not None:
                self._end(StuckError(*found), speak=False)
        self._round += 1

    def _await(self, key: str) -> str | None:
        deadline = time.monotonic() + 3 * _ANSWER_S
        while time.monotonic() < deadline and not self._stopping.is_set():
            if self._store.check([key]):
                return str(self._store.get(key).decode())
            time.sleep(0.05)
        return None

    def _reports(self) -> dict[int, Report]:
        """Of all ranks that answer in time, and from their ledgers of those that do not and are on this machine."""
        found: dict[int, Report] = {}
        deadline = time.monotonic() + _ANSWER_S
        waiting = set(range(self._size))
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                if self._store.check([f"{self._round}/at/{rank}"]):
                    found[rank] = _decoded(json.loads(self._store.get(f"{self._round}/at/{rank}")))
            waiting -= found.keys()
            time.sleep(0.02)
        for position in _neighbours():
            if position.rank in waiting:
                found[position.rank] = _silent(position)
        return found

    def _report(self) -> Report:
        position = here.position()
        frame = sys._current_frames().get(self._training_thread)
        stack = traceback.extract_stack(frame) if frame is not None else []
        frames = tuple(_frame(f) for f in stack[-8:])
        own = [f for f in stack if not _is_library(f.filename)]
        return Report(position, time.monotonic() - position.since, frames, _frame(own[-1]) if own else "")

    def explain(self, error: BaseException) -> None:
        """To an error that ended a call: where the other ranks of this machine were, so that none of them has to be asked."""
        if isinstance(error, ValueError) or getattr(error, "__notes__", None):  # ours say what they mean
            return
        mine = here.position().rank
        ranks = {p.rank: _silent(p) for p in _neighbours()}
        found = disagreement(ranks) if len(ranks) == self._size else None
        if found is not None:
            error.add_note(str(StuckError(*found)))
        elif len(ranks) > 1:
            others = {rank: report for rank, report in ranks.items() if rank != mine}
            error.add_note("the other ranks at this moment:\n" + "\n".join(places_of(others)))

    def _end(self, error: StuckError, speak: bool) -> None:
        """Ends this process: its training thread waits inside a collective and cannot be reached."""
        record_failure(error, stack="")
        if speak and "TRAINWRIGHT_LAUNCHER_PID" not in os.environ:  # our launcher tells it itself, from the error file
            print(f"error: {error}\n{_DOC}", file=sys.stderr, flush=True)
        if speak:
            time.sleep(4 * self._period_s)  # so that all ranks read the verdict before the store may go
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_running: Watch | None = None


def watch_ranks(limits: Limits) -> None:
    """Starts the watchdog of this process, unless it runs or there is nobody to wait for.

    With several engines the widest limits hold.
    """
    global _running
    if not distributed.several():
        return
    if _running is not None:
        old = _running.limits
        wait_s = None if None in (old.wait_s, limits.wait_s) else max(old.wait_s or 0.0, limits.wait_s or 0.0)
        _running.limits = Limits(
            max(old.disagree_s, limits.disagree_s), wait_s, max(old.first_wait_s, limits.first_wait_s)
        )
        return
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    _running = Watch(store, dist.get_rank(), dist.get_world_size(), limits)
    _running.start()
    distributed.at_shutdown(_stop)


def _stop() -> None:
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def _neighbours() -> list[Position]:
    return ledger.read_folder(here.path.parent) if here.path is not None else []


def _silent(position: Position) -> Report:
    return Report(position, time.monotonic() - position.since, answers=False, gone=_gone(position))


def _gone(position: Position) -> bool:
    """Whether the process has ended, reaped or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{position.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    with contextlib.suppress(OSError):
        os.kill(position.pid, 0)
        return False
    return True


def _is_library(filename: str) -> bool:
    package = str(Path(__file__).parents[1])
    return filename.startswith((package, "<")) or "site-packages" in filename or "/lib/python" in filename


def _frame(frame: traceback.FrameSummary) -> str:
    code = f": {frame.line.strip()}" if frame.line else ""
    return f"{frame.filename}:{frame.lineno} in {frame.name}{code}"[:160]


def _encoded(report: Report) -> dict[str, Any]:
    return asdict(report)


def _decoded(data: dict[str, Any]) -> Report:
    position = dict(data["position"], last_collectives=tuple(data["position"]["last_collectives"]))
    return Report(
        Position(**position), data["waited_s"], tuple(data["frames"]), data["user_frame"], data["answers"], data["gone"]
    )
