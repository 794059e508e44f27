"""Where a step's time goes: sums, overlaps, phases; and the profiler around a real step."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from trainwright.config.run_schema import ProfileConfig
from trainwright.monitor.breakdown import Event, break_down, common, length, union, without
from trainwright.monitor.metrics import Metrics
from trainwright.monitor.profile import StepProfiler
from trainwright.monitor.profile_file import read_profile
from trainwright.monitor.report import render
from trainwright.phases import DATA, FORWARD, UPDATE, phase


def test_spans() -> None:
    a = union([(5, 7), (0, 2), (1, 3), (7, 8), (9, 9)])
    assert a == [(0, 3), (5, 8)]
    assert common(a, [(2, 6), (7, 10)]) == [(2, 3), (5, 6), (7, 8)]
    assert without(a, [(1, 2), (6, 10)]) == [(0, 1), (2, 3), (5, 6)]
    assert length(a) == 6


def mark(name: str, start: float, end: float) -> Event:
    return Event(f"trainwright.{name}", start, end)


def test_every_moment_of_a_step_is_counted_once() -> None:
    events = [
        mark("step", 0, 1000), mark("data", 0, 100), mark("forward", 100, 400), mark("backward", 400, 800), mark("update", 800, 950),
        Event("aten::mm", 120, 300), Event("aten::mm", 150, 250), Event("aten::mm", 420, 700), Event("aten::mul", 810, 900),
        Event("gloo:all_reduce", 600, 780),
        Event("aten::mm", 1200, 1400),  # outside any step
    ]  # fmt: skip
    found = break_down(events, [("aten::mm", 460.0, 3)])
    parts = dict(found.parts)
    assert found.step_ms == pytest.approx(1.0)
    assert sum(parts.values()) == pytest.approx(1.0)
    assert parts["forward: compute"] == pytest.approx(0.180)
    assert parts["backward: compute"] == pytest.approx(0.280)
    assert parts["update: compute"] == pytest.approx(0.090)
    assert parts["communication, exposed"] == pytest.approx(0.080)
    assert found.hidden_communication_ms == pytest.approx(0.100)
    assert parts["waiting for data"] == pytest.approx(0.100)
    assert parts["host"] == pytest.approx(0.270)
    assert found.operators == (("aten::mm", 0.46, 3),)


def test_on_accelerators_kernels_compute_and_talk() -> None:
    events = [
        mark("step", 0, 1000), Event("aten::mm", 10, 900), Event("sm90_gemm", 100, 500, "cuda"),
        Event("ncclDevKernel_AllReduce", 400, 700, "cuda"),
    ]  # fmt: skip
    parts = dict(break_down(events).parts)
    assert parts["other compute"] == pytest.approx(0.4)
    assert parts["communication, exposed"] == pytest.approx(0.2)
    assert parts["host"] == pytest.approx(0.4)


def test_real_steps_are_traced(tmp_path: Path) -> None:
    layer = nn.Linear(256, 256)
    profiler = StepProfiler(ProfileConfig(steps=2, after=1), tmp_path, 0, [("layer", layer)], torch.device("cpu"))
    x = torch.randn(512, 256)
    for _ in range(4):
        with profiler.step():
            with phase(DATA):
                time.sleep(0.02)
            with phase(FORWARD):
                out = layer(x).sum()
            with phase(UPDATE):
                out.backward()
    found = profiler.result
    assert found is not None
    assert found.steps == 2
    parts = dict(found.parts)
    assert parts["waiting for data"] >= 15
    assert parts["forward: compute"] > 0
    assert sum(parts.values()) == pytest.approx(found.step_ms)
    assert any("mm" in name for name, *_ in found.operators)
    assert {"forward of layer", "backward of layer"} <= {where for where, _ in profiler.places}
    assert not layer._forward_hooks
    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        assert json.load(file)["traceEvents"]
    told = read_profile(tmp_path)
    assert told is not None
    page = render("run", Metrics({}, [], []), {}, "", told)
    assert "Where a step's time goes" in page
    assert "forward of layer" in page


def test_a_launch_that_ends_inside_the_trace_gives_what_there_is(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    profiler = StepProfiler(ProfileConfig(steps=5, after=1), tmp_path, 0, [("layer", layer)], torch.device("cpu"))
    for _ in range(3):
        with profiler.step():
            layer(torch.ones(2, 8))
    assert profiler.finish() == "2 of profile.steps=5 steps traced: the launch ended"
    assert profiler.result is not None
    assert profiler.result.steps == 2
    assert profiler.finish() is None
    late = StepProfiler(ProfileConfig(steps=1, after=9), tmp_path, 0, [], torch.device("cpu"))
    with late.step():
        pass
    told = late.finish()
    assert told is not None
    assert "profile.after=9" in told
    assert StepProfiler(ProfileConfig(), tmp_path, 0, [], torch.device("cpu")).finish() is None


def test_a_profile_that_is_not_one_is_left_out(tmp_path: Path) -> None:
    assert read_profile(tmp_path) is None
    hostile = {"step_ms": 1, "steps": 1, "hidden_communication_ms": 0, "operators": [], "memory": [],
               "parts": [{"name": "<script>", "ms": 1}]}  # fmt: skip
    page = render("run", Metrics({}, [], []), {}, "", hostile)
    assert "&lt;script&gt;" in page
    assert "Where a step" not in render("run", Metrics({}, [], []), {}, "", {"parts": 3})
