"""Sinks beside metrics.jsonl: written when asked, refused clearly when not installed."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_metrics import record

from trainwright.errors import ConfigError
from trainwright.monitor import sinks
from trainwright.monitor.metrics import EvaluationRecord, read_metrics


def test_jsonl_always(tmp_path: Path) -> None:
    opened = sinks.open_sinks(tmp_path, header={"run": "r"})
    opened.step(record(1))
    opened.evaluation(EvaluationRecord(1, 2.0))
    opened.close()
    metrics = read_metrics(tmp_path)
    assert len(metrics.steps) == len(metrics.evaluations) == 1


def test_a_sink_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trainwright\\[track\\]"):
        sinks.open_sinks(tmp_path / "run", ["wandb"])
    assert not (tmp_path / "run").exists()


def test_an_unknown_sink_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensorboard, wandb"):
        sinks.check_installed(["mlflow"])


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    # In a process of its own: TensorBoard's imports warn about things that are not ours to repair.
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_metrics import record\n"
        "import math; from trainwright.monitor import sinks\n"
        "from trainwright.monitor.metrics import EvaluationRecord\n"
        "opened = sinks.open_sinks(sys.argv[1], ['tensorboard'])\n"
        "opened.step(record(1)); opened.step(record(2, grad_norm=math.inf))\n"
        "opened.evaluation(EvaluationRecord(2, 2.5, 1.25)); opened.close()\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1] + '/tensorboard'); events.Reload()\n"
        "print([e.step for e in events.Scalars('train/loss')], [e.step for e in events.Scalars('train/grad_norm')],"
        " events.Scalars('heldout/val_bits_per_byte')[0].value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().splitlines()[-1] == "[1, 2] [1] 1.25"


def test_only_finite_numbers_reach_a_tracker() -> None:
    scalars = sinks._scalars({"step": 3, "loss": 1.5, "grad_norm": math.nan, "note": "x", "best": True, "mfu": None})
    assert scalars == {"loss": 1.5}
