"""The bytes of a step over its operators."""

from __future__ import annotations

from collections import Counter

from small import transformer
from trainwright.config import load_config
from trainwright.dry_run.run import dry_run
from trainwright.dry_run.timeline import Timeline
from trainwright.planner.show_dry_run import drawn


def test_it_stays_short_and_keeps_the_peak() -> None:
    timeline = Timeline()
    for operator in range(10_000):
        if operator == 4_321:
            timeline.note("backward", 99, Counter(activations=99))
        timeline.tick("forward", operator % 7, Counter(activations=operator % 7))
    assert 240 <= len(timeline.moments) <= 480
    fullest = max(timeline.moments, key=lambda moment: moment.total_bytes)
    assert (fullest.total_bytes, fullest.phase) == (99, "backward")
    place = timeline.moments.index(fullest) / len(timeline.moments)
    assert abs(place - 0.4321) < 0.01


def test_a_step_rises_and_falls() -> None:
    config = {"precision": "fp32", "batch": {"micro_size": 2, "accumulation": 2}, "data": {"sequence_length": 16}}
    run = dry_run(load_config(config), 1, model=transformer, vocab_size=32)
    assert max(moment.total_bytes for moment in run.timeline) == run.peak_bytes
    phases = "".join(moment.phase[0] for moment in run.timeline)
    assert phases.count("u") > 0
    assert phases.endswith("u")
    assert "".join(c for i, c in enumerate(phases) if i == 0 or phases[i - 1] != c).startswith("fbfb")
    assert abs(run.timeline[0].total_bytes - run.between_steps_bytes) < run.peak_bytes / 2
    for moment in run.timeline:
        assert sum(moment.by_kind.values()) == moment.total_bytes
    lines = drawn(run.timeline)
    assert len(lines) == 10
    assert lines[0].count("█") + lines[0].count("▇") >= 1
    assert set(lines[8].split("└")[1]) == {"f", "b", "u"}
    assert drawn([]) == []
