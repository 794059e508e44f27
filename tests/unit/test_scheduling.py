"""Threads that are started behind the computation: their policy, and the caller's."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from trainwright.scheduling import behind_computation, put_behind_computation


def _may_choose() -> bool:
    """Whether this process has the usual policy, and may give threads another: not so in some sandboxes."""
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


pytestmark = pytest.mark.skipif(not _may_choose(), reason="Linux's policies, where they may be chosen")


def _policy_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_started_inside_wait_their_turn_and_those_after_do_not() -> None:
    with behind_computation():
        assert _policy_of_a_new_thread() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert _policy_of_a_new_thread() == os.SCHED_OTHER


def test_not_wanted() -> None:
    with behind_computation(False):
        assert _policy_of_a_new_thread() == os.SCHED_OTHER


def test_the_callers_policy_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), behind_computation():
        raise RuntimeError("inside")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_inside_one_another() -> None:
    with behind_computation():
        with behind_computation():
            pass
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_policy_that_somebody_chose_stays() -> None:
    found: list[int] = []

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with behind_computation():
            found.append(os.sched_getscheduler(0))
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE] * 2


def test_threads_that_run_already_are_found_by_name() -> None:
    asked, seen, found = threading.Event(), threading.Event(), []

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("gloo_of_a_test")
        asked.set()
        seen.wait(10)
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=run)
    thread.start()
    asked.wait(10)
    put_behind_computation("gloo_of_a")
    seen.set()
    thread.join()
    assert found == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_sandbox_that_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with behind_computation():
        assert _policy_of_a_new_thread() == os.SCHED_OTHER


def test_names_that_the_kernel_cut_inside_a_character() -> None:
    """It keeps fifteen bytes of them."""
    ready, over = threading.Event(), threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes("a数据加载工人".encode())
        ready.set()
        over.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        put_behind_computation("gloo_tcp")
    finally:
        over.set()
        thread.join()
