"""Signals in a worker: a stop that the training loop can ask for, and an end with the parent.

Only the standard library is imported, so that a worker can do this before anything slow.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int | None = None) -> bool:
    """Asks the kernel to kill this process when the one that started it ends, however that ends (Linux).

    SIGKILL and not SIGTERM: without its launcher a rank has no store to finish a collective save with, and a
    checkpoint is whole or absent at any moment. parent_pid: the launcher's; if it is gone already, this process ends
    here. Returns False where the system cannot do it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        done = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False
    if parent_pid is not None and os.getppid() != parent_pid:  # it ended before we asked
        os._exit(1)
    return done


class StopSignal:
    """`requested` turns true when SIGTERM, SIGINT, SIGHUP or SIGUSR1 asks this process to end; the training loop looks at it.

    Python runs a handler only between byte codes of the main thread, which may be waiting inside a collective. The
    interpreter's wake-up socket is written at once, from whichever thread took the signal, and a small thread reads it.

    Create it in the main thread once the process groups stand: before that there is nothing to save, and the default
    action (end at once) is right. A second Ctrl-C ends at once, with KeyboardInterrupt; a second SIGTERM changes
    nothing, because launchers repeat it while a save is under way.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_name = ""
        self._interrupts = 0
        self._old: dict[int, Any] = {}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) == signal.SIG_IGN:  # nohup: keep ignoring
                continue
            self._old[number] = signal.signal(number, self._handle)
            signal.siginterrupt(number, False)  # no system call of a library comes back half done
        self._thread = threading.Thread(target=self._watch, name="stop-signal", daemon=True)
        self._thread.start()

    @property
    def requested(self) -> bool:
        """A stop was asked for. Ranks may see it at different steps: agree on it before acting on it."""
        return self._event.is_set()

    def request(self, reason: str) -> None:
        """Asks for the stop from inside the process, such as when `stop_after` has passed."""
        if not self._event.is_set():
            self.signal_name = reason
            self._event.set()

    def close(self) -> None:
        """Gives the signals back to whoever had them; a second call does nothing."""
        if not self._old and self._writer.fileno() < 0:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._old.clear()
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()  # the watcher reads the end and returns
        self._thread.join(timeout=5)
        self._reader.close()

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Main thread: the watcher has most likely noted the signal already; here only repeated Ctrl-C is counted."""
        self._note(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def _note(self, number: int) -> None:
        self.request(signal.Signals(number).name)

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number in self._old:
                        self._note(number)
