"""Which rank is to blame, and what is said about it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from trainwright.launch.failure import describe_failure, may_pass, shortened

pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")


class Failures:
    """Failures as torch's agent reports them, with error files where a rank raised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[int, Any] = {}

    def add(self, rank: int, exitcode: int, text: str = "", *, at_s: float = 100.0, deliberate: bool = False) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        file = self.folder / f"error-{rank}.json"
        if text:
            extra = {
                "py_callstack": f"Traceback of {text}", "timestamp": str(int(at_s)), "time_s": at_s,
                "deliberate": deliberate, "text": text,
            }  # fmt: skip
            file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
        self.found[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))

    def said(self, **facts: int) -> str:
        return describe_failure(self.found, self.folder, **facts)


@pytest.fixture
def failures(tmp_path: Path) -> Failures:
    return Failures(tmp_path)


def test_the_earliest_own_error_is_the_cause(failures: Failures) -> None:
    failures.add(0, 1, "second", at_s=100.4)
    failures.add(2, 1, "first", at_s=100.2)
    failures.add(1, -signal.SIGTERM)
    text = failures.said()
    assert text.startswith("rank 2 failed first (exit code 1); ranks 0-1 ended after it\nTraceback of first")


def test_a_killed_rank_is_the_cause_of_lost_connections(failures: Failures) -> None:
    failures.add(0, 1, "Connection closed by peer [127.0.0.1]:1", at_s=1.0)
    failures.add(1, -signal.SIGKILL)
    assert failures.said().startswith("rank 1 died by SIGKILL; rank 0 ended after it")
    assert "the kernel's out-of-memory killer did not" in failures.said()
    assert "was killed by the kernel's out-of-memory killer" in failures.said(oom_kills_seen=1)


def test_a_rank_that_the_agent_had_to_kill_is_not_the_cause(failures: Failures) -> None:
    failures.add(0, -signal.SIGKILL)  # hung, until the agent lost patience
    failures.add(1, 1, "the cause", at_s=1.0)
    assert failures.said().startswith("rank 1 failed first")


def test_ours_show_without_a_traceback(failures: Failures) -> None:
    failures.add(1, 1, "got\n  rule: r", deliberate=True)
    failures.add(0, -signal.SIGTERM)
    assert "Traceback" not in failures.said()
    assert "got\n  rule: r" in failures.said()


def test_without_an_error_file_the_end_of_the_log_is_shown(failures: Failures) -> None:
    (failures.folder / "rank-1.log").write_text("\n".join(f"line {i}" for i in range(100)))
    failures.add(1, -signal.SIGSEGV)
    text = failures.said()
    assert "died by SIGSEGV" in text
    assert "line 99" in text
    assert "line 50" not in text


def test_which_failures_may_pass_when_started_again(failures: Failures) -> None:
    assert not may_pass({})
    failures.add(1, -signal.SIGKILL)
    assert may_pass(failures.found)
    failures.add(0, 1, "a typo", deliberate=True)
    assert not may_pass(failures.found)


def test_long_tracebacks_lose_the_frames_of_libraries_first() -> None:
    frames = [f'  File "/lib/python3.11/site-packages/torch/x{i}.py", line 1, in f\n    f()' for i in range(40)]
    own = '  File "/home/me/train.py", line 7, in main\n    engine.step()'
    text = "\n".join(["Traceback (most recent call last):", own, *frames, "RuntimeError: boom"])
    assert shortened(text).splitlines() == [
        "Traceback (most recent call last):", *own.splitlines(), "  ... 40 frame(s) of libraries", "RuntimeError: boom",
    ]  # fmt: skip
    many = "\n".join(["Traceback:", *[own] * 60, "RuntimeError: boom"])
    assert len(shortened(many).splitlines()) == 22
    assert shortened(many).endswith("RuntimeError: boom")


def test_no_result(tmp_path: Path) -> None:
    assert "launcher.log" in describe_failure({}, tmp_path)
