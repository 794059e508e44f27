"""Ranks on this machine: their output, the first failure, signals, the end with the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainwright.errors import LaunchError
from trainwright.launch.run import launch_local, threads_per_rank

WAIT_S = 120.0  # for processes to get somewhere: only a limit, on a machine that may be busy


@pytest.fixture(autouse=True)
def _ranks_find_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {WAIT_S} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Running, and not only waiting to be reaped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Launcher:
    """A launcher process whose ranks wrote their process ids into `folder`."""

    def __init__(self, entry: str, folder: Path) -> None:
        code = (
            "import sys; from trainwright.launch.run import launch_local; "
            f"sys.exit(launch_local([sys.argv[1]], 2, sys.argv[1] + '/logs', entry='launched_ranks:{entry}'))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        files = [folder / f"pid-{rank}" for rank in range(2)]
        wait_for(lambda: self.process.poll() is not None or all(f.is_file() and f.read_text() for f in files), "ranks")
        assert self.process.poll() is None, self.process.communicate()
        self.pids = [int(file.read_text()) for file in files]

    def end(self, *signals: signal.Signals) -> tuple[int, str]:
        """Exit code and standard error after these signals; checks that no rank is left."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.1)
        _, said = self.process.communicate(timeout=WAIT_S)
        wait_for(lambda: not any(alive(pid) for pid in self.pids), "end of the ranks")
        return self.process.returncode, said


def test_output_arguments_and_threads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second launch appends to the logs of the first
        assert launch_local(["train", "a=b"], 2, tmp_path / "logs", entry="launched_ranks:report") == 0
    out, err = capfd.readouterr()
    assert out.count("out of rank 0 of 2: ['train', 'a=b']") == 2
    assert f"threads={threads_per_rank(2)}" in out
    assert err == "err of rank 0\n" * 2
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    assert log.count("out of rank 1 of 2") == log.count("err of rank 1") == 2
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_first_failing_rank_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local([], 2, tmp_path, entry="launched_ranks:fail_on_one") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("rank 1 failed first (exit code 1)")
    assert err.count("RuntimeError: the embedding is on fire") == 1
    assert err.count("Traceback") == 1
    assert "closed by peer" not in err  # what rank 0 saw of it
    assert str(tmp_path) in err
    assert "the embedding is on fire" in (tmp_path / "rank-1.log").read_text()


def test_what_every_rank_refuses_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local([], 2, tmp_path, entry="launched_ranks:fail_on_purpose") == 1
    err = capfd.readouterr().err
    assert err.startswith("zero.stage: 7\n  rule:   stages are 0, 1, 2 and 3\n  remedy: zero.stage=2\n  where:  rank ")
    assert err.count("remedy") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_ranks_which_save_and_end_well(tmp_path: Path, number: signal.Signals) -> None:
    code, said = Launcher("train_until_stopped", tmp_path).end(number)
    assert code == 0, said
    assert "Traceback" not in said
    assert [(tmp_path / f"saved-{rank}").is_file() for rank in range(2)] == [True, True]


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    code, said = Launcher("sleep_through_stops", tmp_path).end(signal.SIGINT, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "Traceback" not in said


def test_a_stop_before_training_ends_at_once(tmp_path: Path) -> None:
    code, said = Launcher("sleep_long", tmp_path).end(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert said == "stopped before the ranks could save; nothing more was written\n"


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    code, _ = Launcher("sleep_long", tmp_path).end(signal.SIGKILL)
    assert code == -signal.SIGKILL


def test_one_rank_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert launch_local([str(tmp_path)], 1, tmp_path / "logs", entry="launched_ranks:leave_pid") == 0
    assert (tmp_path / "pid").read_text() == str(os.getpid())
    assert not (tmp_path / "logs").exists()


def test_no_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="at least one rank"):
        launch_local([], 0, tmp_path)
