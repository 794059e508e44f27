"""Stops that somebody asked for, and restarts: an agreed save, then exactly on; a failing run starts again by itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from soak import compare, disturb, prepare_data, ranks_of, settings, start, steps_done

STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    process = start(settings(data, run_dir, STEPS), 2)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return run_dir


def _after_steps(process: subprocess.Popen[str], run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 90
    while steps_done(run_dir) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]


@pytest.mark.parametrize(("number", "of"), [(signal.SIGUSR1, "launcher"), (signal.SIGTERM, "rank 1")])
def test_a_stop_saves_and_the_same_command_goes_on(
    number: signal.Signals, of: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    command = settings(data, tmp_path / "run", STEPS)
    process = start(command, 2)
    _after_steps(process, tmp_path / "run", 5)
    before = steps_done(tmp_path / "run")
    os.kill(process.pid if of == "launcher" else sorted(ranks_of(process.pid))[int(of[-1])], number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    done = steps_done(tmp_path / "run")
    assert done < STEPS
    assert "saved; the same command goes on from here" in text
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    assert done - before <= 4  # two steps, and what is done before the signal is sent
    if of == "launcher":
        last = start(command, 2)
        text, _ = last.communicate(timeout=200)
        assert last.returncode == 0, text
        compared = compare(tmp_path / "run", whole, STEPS)
        assert compared == {"steps": [STEPS, STEPS], "same_samples": True, "loss_error": 0.0, "same_weights": True}


def test_max_restarts_goes_on_by_itself(data: Path, whole: Path, tmp_path: Path) -> None:
    command = [*settings(data, tmp_path / "run", STEPS), "--max-restarts", "2"]
    process = start(command, 2)
    _after_steps(process, tmp_path / "run", 10)
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert "died by SIGKILL" in text
    assert "restart 1 of 2" in text
    assert compare(tmp_path / "run", whole, STEPS)["same_weights"]


def test_random_kills_lose_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    """`make faults` runs it with 30 kills, and with another number of ranks at each start."""
    found = disturb(settings(data, tmp_path / "run", STEPS), tmp_path / "run", [2], 2, random.Random(0), STEPS)
    assert found.kills >= 1
    compared = compare(tmp_path / "run", whole, STEPS)
    assert compared == {"steps": [STEPS, STEPS], "same_samples": True, "loss_error": 0.0, "same_weights": True}
    assert all(text.count("\n") <= 40 for text in found.outputs)
