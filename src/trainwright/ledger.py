"""Where this rank is: step, micro-batch, call, phase, module, last collective, and since when.

Written from below (engine, runners, collectives), watched from above (`guard/`, the launcher). A launch of several
ranks keeps each rank's ledger in a memory-mapped file, which a rank that is killed leaves behind; a lone process keeps
it in memory. A note costs about a microsecond: docs/benchmarks.md has the measurement.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from trainwright.position import (
    AT_CALL,
    AT_COUNT,
    AT_MODULE,
    AT_MOVE,
    AT_PHASE,
    AT_RING,
    AT_SAME,
    AT_STEP,
    AT_TIMES,
    BYTES,
    CALL,
    COUNT,
    HEAD,
    MAGIC,
    MODULE,
    MOVE,
    NAME,
    PHASE,
    RING,
    SAME,
    STEP,
    TIMES,
    Position,
    decode,
)
from trainwright.processes import ProcessId

VARIABLE = "TRAINWRIGHT_LEDGER"
"""Environment variable: the folder of this launch's ledgers, chosen by the launcher."""
LAUNCHER = "launcher.ledger"
"""The launcher's own, so that nobody sweeps what it has yet to read."""

_TEXTS = {size: struct.Struct(f"{size}s") for size in {CALL, PHASE, MODULE, NAME}}

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


class _Within:
    """A call or a phase: written on entering, the one before it on leaving. What an exception ends stays in the file, to
    be read afterwards."""

    __slots__ = ("_before", "_ledger", "_name", "_step")

    def __init__(self, ledger: Ledger, name: str, step: int | None = None) -> None:
        self._ledger, self._name, self._step = ledger, name, step
        self._before = ""

    def __enter__(self) -> None:
        if self._step is None:
            self._before = self._ledger._phase
            self._ledger.set_phase(self._name)
        else:
            self._before = self._ledger._call
            if not self._before:
                self._ledger._begin_call(self._name, self._step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ledger = self._ledger
        if self._step is None:
            ledger._phase = self._before
            if kind is None:
                ledger.set_phase(self._before)
        elif not self._before:
            ledger._call = ""
            if kind is None:
                ledger._end_call()


class Ledger:
    """This process's. One writer at a time: the thread that trains, or autograd's on its behalf."""

    def __init__(self) -> None:
        self._map: Any = bytearray(BYTES)
        _set_head(self._map, 0, 1, "")
        self._path: Path | None = None
        self._notes = self._collectives = self._steps = self._crc = 0
        self._call = self._phase = ""
        self._slowest_s, self._step_began = 0.0, 0.0
        self.explain: Callable[[BaseException], None] | None = None
        """Set by the guard: adds to an error that ends a call what it knows of the other ranks."""

    # --- the file --------------------------------------------------------------------------------------------------

    def open(self, path: Path, rank: int, world_size: int, host: str) -> None:
        """Goes on in a file of its own, which this user's other processes may read. Raises OSError where it cannot be."""
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder} is another user's")
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            os.ftruncate(descriptor, BYTES)
            shared = mmap.mmap(descriptor, BYTES)
        finally:
            os.close(descriptor)
        shared[:] = bytes(self._map)
        _set_head(shared, rank, world_size, host)
        self._map, self._path = shared, path
        self._note()

    @property
    def path(self) -> Path | None:
        """The file; None for a lone process."""
        return self._path

    def close(self, keep: bool = False) -> None:
        """Back to memory of its own. The file goes, or stays for those who ask what this rank died of."""
        if self._path is None:
            return
        shared, self._map = self._map, bytearray(bytes(self._map))
        shared.close()
        if not keep:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks' ledgers are still in it
                self._path.parent.rmdir()
        self._path = None

    # --- notes -----------------------------------------------------------------------------------------------------

    def _note(self) -> None:
        self._notes += 1
        MOVE.pack_into(self._map, AT_MOVE, self._notes, time.monotonic())

    def _text(self, at: int, size: int, text: bytes) -> None:
        _TEXTS[size].pack_into(self._map, at, text)  # cut, or filled up with zeros

    def call(self, name: str, step: int | None = None) -> _Within:
        """Around a call of the engine's. step: optimizer steps done before it, by default as many as were noted last. A call
        inside a call has the outer's name."""
        return _Within(self, name, self._steps_done() if step is None else step)

    def _steps_done(self) -> int:
        return max(0, int(struct.unpack_from("<q", self._map, AT_STEP)[0]) - 1)

    def begin_call(self, name: str) -> None:
        """From here on, between two steps: a call that nothing comes after."""
        self._begin_call(name, self._steps_done())

    def _begin_call(self, name: str, step: int) -> None:
        self._call = name
        STEP.pack_into(self._map, AT_STEP, step + 1, 0, 0)
        self._text(AT_CALL, CALL, name.encode())
        self.set_phase("")

    def _end_call(self) -> None:
        self._text(AT_CALL, CALL, b"")
        self.set_phase("")

    def phase(self, name: str) -> _Within:
        """Around a phase of the step (forward, backward, update, data)."""
        return _Within(self, name)

    def set_phase(self, name: str) -> None:
        """The phase from here on."""
        self._phase = name
        self._text(AT_PHASE, PHASE, name.encode())
        self._text(AT_MODULE, MODULE, b"")
        self._note()

    def micro_batch(self, index: int, count: int) -> None:
        """Micro-batch `index` (from 0) of `count`."""
        struct.pack_into("<qq", self._map, AT_STEP + 8, index + 1, count)

    def module(self, name: bytes) -> None:
        """Forward or backward has come to this module."""
        self._text(AT_MODULE, MODULE, name)
        self._note()

    def collective(self, name: bytes) -> None:
        """A collective is about to be called, such as all_gather(blocks.3)."""
        self._text(AT_RING + self._collectives % RING * NAME, NAME, name)
        self._collectives += 1
        self._crc = zlib.crc32(name, self._crc)
        COUNT.pack_into(self._map, AT_COUNT, self._collectives)
        self._note()

    def step_done(self, step: int) -> None:
        """Optimizer step `step` (from 1) has landed: its time tells the guard what is long."""
        now = time.monotonic()
        self._steps += 1
        if self._steps > 2:  # the first one compiles and allocates; it is over where the second begins
            self._slowest_s = max(self._slowest_s, now - self._step_began)
        self._step_began = now
        TIMES.pack_into(self._map, AT_TIMES, self._steps, self._slowest_s, _peak_bytes())
        STEP.pack_into(self._map, AT_STEP, step + 1, 0, 0)
        self._note()

    def take_fingerprint(self) -> int:
        """20 bits of the names of the collectives since it was last taken, in their order: equal on ranks that did the same."""
        found, self._crc = self._crc & 0xFFFFF, 0
        return found

    def ranks_differ(self) -> None:
        """From here on this rank's collectives are not those of all others: they hold other parts of the model."""
        SAME.pack_into(self._map, AT_SAME, True)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is noted inside it is not the job's (a dry run): afterwards the ledger is as it was."""
        before = vars(self).copy()
        self._map = bytearray(bytes(self._map))
        try:
            yield
        finally:
            vars(self).update(before)

    def position(self) -> Position:
        """What it says now."""
        position = decode(bytes(self._map))
        assert position is not None, "a ledger has its head from the start"
        return position


def _set_head(content: Any, rank: int, world_size: int, host: str) -> None:
    own = ProcessId.own()
    HEAD.pack_into(content, 0, MAGIC, rank, world_size, own.pid, own.namespace, own.start, host.encode()[:55])


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


here = Ledger()
"""This process's ledger."""


def collective_call(name: str) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """For a method of an object with a `global_step`: notes the call, and has the guard explain an error that ends it."""

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                with here.call(name, self.global_step):  # type: ignore[attr-defined]
                    return method(self, *args, **kwargs)
            except Exception as error:
                if here.explain is not None:
                    here.explain(error)
                raise

        return run

    return decorate
