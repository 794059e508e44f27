"""Finding a run before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.cli import main
from trainwright.errors import CheckpointError
from trainwright.run_folder import find_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as far as finding it goes, below the working folder."""
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_run_and_a_checkpoint_in_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run("runs/mine") == Path("runs/mine")
    assert find_run("runs/mine/checkpoints/step-00000010").samefile(run)
    monkeypatch.chdir(run / "checkpoints")
    assert find_run("step-00000010").samefile(run)
    with pytest.raises(CheckpointError):
        find_run("step-00000011")


def test_a_wrong_name_is_answered_with_those_nearby(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"runs/mien is no run.*\n.*\n.*one of: mine"):
        find_run("runs/mien")
    with pytest.raises(CheckpointError, match="the run_dir that"):
        find_run("elsewhere/none")


def test_eval_of_a_wrong_name_starts_no_rank_and_leaves_nothing_behind(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.parents[1].rglob("*"))
    assert main(["eval", "typo", "--nproc", "2"]) == 2
    assert "typo is no run" in capfd.readouterr().err
    assert sorted(run.parents[1].rglob("*")) == before


def test_finding_a_run_imports_no_torch() -> None:
    code = "import sys, trainwright.run_folder; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False"
