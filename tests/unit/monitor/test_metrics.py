"""metrics.jsonl: strict JSON, each step once whatever the restarts, damage survived or named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trainwright.errors import DataError
from trainwright.monitor.metrics import (
    EvaluationRecord,
    MetricsWriter,
    StepRecord,
    read_metrics,
    read_summary,
    write_summary,
)


def record(step: int, **changes: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "step": step, "tokens": step * 512, "samples": step * 4, "loss": 3.0 / step, "lr": 1e-3, "grad_norm": 0.5,
        "loss_scale": 1.0, "skipped": 0, "step_time_s": 0.1, "tokens_per_s": 5120.0, "mfu": 0.4,
        "peak_memory_bytes": 2**30,
    }  # fmt: skip
    return StepRecord(**{**fields, **changes})


def write(folder: Path, steps: range, resume_step: int = 0) -> None:
    writer = MetricsWriter(folder, {"run": "r"}, resume_step)
    for step in steps:
        writer.step(record(step))
        if step % 5 == 0:
            writer.evaluation(EvaluationRecord(step, 2.0, 1.1))
    writer.close()


def test_fields_of_the_contract(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "step", "step"]
    contract = "step tokens loss lr grad_norm loss_scale skipped step_time_s tokens_per_s mfu peak_memory_bytes"
    assert set(contract.split()) <= set(lines[1])
    assert "val_loss" not in lines[1]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(record(1))
    assert read_metrics(tmp_path).steps[0]["step"] == 1
    writer.close()
    writer.close()


def test_non_finite_values_are_strict_json_and_come_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(record(1, loss=math.nan, grad_norm=math.inf, mfu=-math.inf))
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    step = read_metrics(tmp_path).steps[0]
    assert math.isnan(step["loss"])
    assert step["grad_norm"] == math.inf
    assert step["mfu"] == -math.inf


@pytest.mark.parametrize("resume_step", [0, 1, 4, 5, 10])
def test_resume_holds_each_step_once(tmp_path: Path, resume_step: int) -> None:
    write(tmp_path, range(1, 11))
    write(tmp_path, range(resume_step + 1, 13), resume_step)
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics.steps] == list(range(1, 13))
    assert [line["step"] for line in metrics.evaluations] == [5, 10]
    assert metrics.header["run"] == "r"
    assert (tmp_path / "metrics.jsonl").read_text().count('"header"') == 1


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [line["step"] for line in read_metrics(path).steps] == [1, 2]
    write(tmp_path, range(3, 5), resume_step=3)
    assert [line["step"] for line in read_metrics(path).steps] == [1, 2, 3, 4]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:10]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_no_metrics_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run_dir"):
        read_metrics(tmp_path)


def test_summary_round_trip(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    write_summary(tmp_path, {"name": "x", "final": {"loss": math.nan}, "checkpoint": tmp_path})
    assert read_summary(tmp_path) == {"name": "x", "final": {"loss": "nan"}, "checkpoint": str(tmp_path)}
