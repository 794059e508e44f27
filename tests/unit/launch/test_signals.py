"""StopSignal: seen at once even while the main thread is inside native code, and given back afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainwright.launch.signals import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with StopSignal() as stop:
        assert not stop.requested
    stop.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_the_stop(number: signal.Signals) -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop._event.wait(10)
        assert stop.signal_name == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it while a save is under way
        time.sleep(0.01)
        assert stop.requested


def test_a_second_interrupt_ends_at_once() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop._event.wait(10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_request_from_inside() -> None:
    with StopSignal() as stop:
        stop.request("stop_after")
        stop.request("later")
        assert stop.requested
        assert stop.signal_name == "stop_after"


def test_seen_while_the_main_thread_is_in_native_code() -> None:
    # The main thread waits in a lock that C code holds on to: Python handlers cannot run there. The watcher's thread
    # must see the signal all the same; it lets the main thread go, which reports.
    code = """
import os, signal, sys, threading
import ctypes
from trainwright.launch.signals import StopSignal
stop = StopSignal()
seen = []
def watcher():
    stop._event.wait(30)
    seen.append(stop.requested)
    os.write(write_end, b"x")
read_end, write_end = os.pipe()
threading.Thread(target=watcher).start()
print("ready", flush=True)
libc = ctypes.CDLL(None)
buffer = ctypes.create_string_buffer(1)
libc.read(read_end, buffer, 1)  # restarted after the signal, never back in Python until the watcher writes
print(seen, buffer.raw)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "[True] b'x'\n"
    assert process.returncode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_dies_with_its_parent_or_at_once_when_it_is_gone() -> None:
    code = "from trainwright.launch.signals import die_with_parent; die_with_parent(1); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
