"""The watchdog: a thread of every rank that notices when ranks wait for each other in vain, says who and where, and ends.

Each has a store client of its own (a blocking call of another's would hold it up). A rank whose ledger stands still
longer than it should calls a hearing: every rank posts its position and the stack of its training thread, the one that
called decides (`verdict.py`), all act on it. While all is well a rank looks at one key of the store a period.

The key `now` says "ROUND idle" or, while a hearing is on, "ROUND KIND CHAIR". Only `compare_set` changes it, so that of
several ranks that call at once one has the chair; a hearing whose chair is gone is closed by whoever notices.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from trainwright import distributed
from trainwright.error_file import record_failure
from trainwright.errors import StuckError
from trainwright.guard.limits import Limits, of_several
from trainwright.guard.testimony import decoded, encoded, testimony
from trainwright.guard.verdict import TORN, Report, disagreement, judge, places_of
from trainwright.ledger import here
from trainwright.ledger_folder import read_folder
from trainwright.position import Position

PERIOD_S = 0.25
_GONE_S = 2.0
"""A rank that waits so long looks whether the others of this machine live; a launcher that is ours will be faster."""
_ANSWER_S = 3.0
"""How long a hearing waits for answers."""
_ALONE_S = 30.0
"""Standstill that ends a rank whose store is gone."""
_DOC = "  see:    docs/faults.md"


class Watch:
    """Runs from `start` to `stop`. One for a process group, whatever the number of engines."""

    def __init__(self, store: Any, rank: int, size: int, limits: Limits) -> None:
        self._store = dist.PrefixStore("trainwright/guard", store.clone())  # type: ignore[attr-defined]
        self._rank, self._size = rank, size
        self.group = dist.group.WORLD
        self.limits = [limits]
        """Of each engine."""
        self._period_s = max(PERIOD_S, size / 4000)  # a look each of very many ranks is work for one store
        self._training_thread = threading.get_ident()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stopping = threading.Event()
        self._heard = -1
        """The last round that this rank took part in."""
        self._asked = (-1, 0.0)
        """Notes at the last hearing that found nothing, and how long this rank had waited then."""
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

    # --- looking ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._period_s) and self._look():
                pass
        except RuntimeError:  # the store's host has ended: nobody is left to agree with
            self._alone()

    def _look(self) -> bool:
        """False when there is nothing to watch any more."""
        if dist.group.WORLD is not self.group:  # the user has destroyed it
            return False
        self._end_with_launcher()
        now = self._now()
        number, kind, *chair = now.split()
        if kind == "idle":
            wanted = self._wanted()
            if wanted is None:
                return True
            self._store.compare_set("now", "" if now == "0 idle" else now, f"{number} {wanted} {self._rank}")
            number, kind, *chair = self._now().split()
        if kind != "idle" and int(number) != self._heard:
            self._heard = int(number)
            self._hearing(int(number), kind, int(chair[0]))
        return True

    def _now(self) -> str:
        return str(self._store.get("now").decode()) if self._store.check(["now"]) else "0 idle"

    def _end_with_launcher(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:  # kill -9 of torchrun leaves its ranks alone
            print("the launcher is gone: this rank ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _wanted(self) -> str | None:
        """The kind of hearing that this rank's standstill calls for."""
        position = here.position()
        if not (position.call or position.phase == "backward"):  # who is outside the engine waits for nobody
            return None
        waited_s = time.monotonic() - position.since
        notes, before_s = self._asked
        again = notes != position.notes or waited_s > 2.0 * before_s  # each time that nothing was found, twice as late
        limits = of_several(self.limits)
        if not again:
            return None
        if waited_s > limits.of(position):
            return "limit"
        if waited_s > _GONE_S and any(not p.process.runs for p in _neighbours()):
            return "gone"
        return "asks" if waited_s > limits.disagree_s else None

    # --- a hearing -------------------------------------------------------------------------------------------------

    def _hearing(self, number: int, kind: str, chair: int) -> None:
        mine = testimony(self._training_thread)
        self._store.set(f"{number}/at/{self._rank}", json.dumps(encoded(mine)))
        now = f"{number} {kind} {chair}"
        if chair == self._rank:
            reports = self._reports(number)
            limits = of_several(self.limits)
            found = judge(
                reports,
                self._size,
                limit_reached=kind == "limit",
                disagree_s=limits.disagree_s,
                outside_s=limits.first_wait_s,
            )
            self._decide(number, now, found, reports)
        else:
            text = self._verdict(number)
            found = json.loads(text) if text is not None else None
            if found is not None:
                self._end(StuckError(*found), speak=False)
            if text is None:  # no word from the chair: whoever comes first closes
                self._store.compare_set("now", now, f"{number + 1} idle")
        self._asked = (mine.position.notes, max(mine.waited_s, 1.0))

    def _decide(self, number: int, now: str, found: tuple[str, str, str] | None, reports: dict[int, Report]) -> None:
        if found is not None:
            record_failure(StuckError(*found), stack="")
        self._store.set(f"{number}/verdict", json.dumps(found))
        if found is not None:
            for report in reports.values():
                if not report.answers and not report.gone:  # it would not end by itself
                    report.position.process.kill(signal.SIGKILL)
            self._end(StuckError(*found), speak=True)
        self._store.compare_set("now", now, f"{number + 1} idle")
        with contextlib.suppress(RuntimeError):  # the round before: nobody reads it any more
            for key in (f"{number - 1}/verdict", *(f"{number - 1}/at/{rank}" for rank in range(self._size))):
                self._store.delete_key(key)

    def _verdict(self, number: int) -> str | None:
        """The chair's, as JSON; None where none came."""
        deadline = time.monotonic() + 3 * _ANSWER_S
        while time.monotonic() < deadline and not self._stopping.is_set():
            if self._store.check([f"{number}/verdict"]):
                return str(self._store.get(f"{number}/verdict").decode())
            time.sleep(0.05)
        return None

    def _reports(self, number: int) -> dict[int, Report]:
        """Of all ranks that answer in time, and from their ledgers of those that do not and are on this machine."""
        found: dict[int, Report] = {}
        deadline = time.monotonic() + _ANSWER_S
        waiting = set(range(self._size))
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                if self._store.check([f"{number}/at/{rank}"]):
                    found[rank] = decoded(json.loads(self._store.get(f"{number}/at/{rank}")))
            waiting -= found.keys()
            time.sleep(0.02)
        for position in _neighbours():
            if position.rank in waiting:
                found[position.rank] = _silent(position)
        return found

    # --- the end ---------------------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> None:
        """To an error of a collective: where the other ranks of this machine were, so that none of them has to be asked."""
        if isinstance(error, ValueError) or not any(phrase in str(error) for phrase in TORN):
            return
        ranks = {p.rank: _silent(p) for p in _neighbours()}
        found = disagreement(ranks) if len(ranks) == self._size else None
        if found is not None:
            error.add_note(str(StuckError(*found)))
        elif len(ranks) > 1:
            others = {rank: report for rank, report in ranks.items() if rank != self._rank}
            error.add_note("the other ranks at this moment:\n" + "\n".join(places_of(others, asked=False)))

    def _alone(self) -> None:
        """Without a store. Collectives may fail by themselves; those of GPUs may not."""
        while not self._stopping.wait(self._period_s) and dist.group.WORLD is self.group:
            self._end_with_launcher()
            mine = testimony(self._training_thread)
            if mine.inside and mine.blocked and mine.waited_s > _ALONE_S:
                got = f"no progress for {mine.waited_s:.0f} s, and the store that rank 0 or the launcher keeps is gone"
                lines = [got, *places_of({self._rank: mine})]
                self._end(
                    StuckError("\n".join(lines), "a step lands on all ranks or on none", "see rank 0's log"), speak=True
                )

    def _end(self, error: StuckError, speak: bool) -> None:
        """Ends this process: its training thread waits inside a collective and cannot be reached."""
        record_failure(error, stack="")
        if speak and "TRAINWRIGHT_LAUNCHER_PID" not in os.environ:  # our launcher tells it itself, from the error file
            print(f"error: {error}\n{_DOC}", file=sys.stderr, flush=True)
        # The store may be rank 0's, and live as long as that: all have to have read the verdict.
        time.sleep((8 if self._rank == 0 else 4) * self._period_s)
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
    if _running is not None and _running.group is not dist.group.WORLD:  # of a group that was destroyed
        _stop()
    if _running is not None:
        _running.limits.append(limits)
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
    return read_folder(here.path.parent) if here.path is not None else []


def _silent(position: Position) -> Report:
    waited_s = time.monotonic() - position.since
    return Report(position, waited_s, answers=False, gone=not position.process.runs)
