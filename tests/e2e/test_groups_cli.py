"""`trainwright train outer.groups=2`: every group started on this machine, and what stands in the way said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from groups import prepare_data
from trainwright.monitor.metrics import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("text"))


def _cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainwright.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=240)


def _settings(data: Path, run_dir: Path) -> list[str]:
    return [
        "model.transformer={dim: 32, layers: 2, heads: 2}", f"data.path={data}", "data.sequence_length=16",
        "batch.global_size=8", "steps=12", f"run_dir={run_dir}", "outer={groups: 2, every: 4}", "compile=false",
    ]  # fmt: skip


def test_one_command_trains_all_groups_of_this_machine(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = _cli("train", *_settings(data, run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "groups 0, 1 begin" in done.stdout
    assert "torchft" not in done.stdout + done.stderr
    metrics = [read_metrics(run_dir / f"group-{group}") for group in (0, 1)]
    assert metrics[0].evaluations[-1]["val_loss"] == metrics[1].evaluations[-1]["val_loss"]
    assert [m.steps[-1]["samples"] for m in metrics] == [96, 96]
    assert [m.header["group"] for m in metrics] == [0, 1]
    assert "held-out" in (run_dir / "group-1" / "logs" / "console.log").read_text()
    seen = [_cli("data", "seen", str(run_dir / f"group-{g}"), "--json") for g in (0, 1)]
    own = [{s for samples in json.loads(d.stdout)["samples"].values() for s in samples} for d in seen]
    assert len(own[0]) == len(own[1]) == 48
    assert own[0].isdisjoint(own[1])
    evaluated = _cli("eval", str(run_dir / "group-1"), "--json")
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize(
    ("more", "environment", "said"),
    [
        ([], {"TRAINWRIGHT_GROUP": "1"}, "outer.lighthouse=host:29510"),
        ([], {"TRAINWRIGHT_GROUP": "one"}, "TRAINWRIGHT_GROUP='one'"),
        ([], {"RANK": "0", "WORLD_SIZE": "1"}, "each group is a launch of its own"),
        (
            ["outer.lighthouse=127.0.0.1:1", "outer.group=0", "outer.timeout=1"],
            {},
            "groups meet at a lighthouse that runs",
        ),
    ],
)
def test_what_stands_in_the_way_is_said(
    data: Path, tmp_path: Path, more: list[str], environment: dict[str, str], said: str
) -> None:
    done = _cli("train", *_settings(data, tmp_path / "run"), *more, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
