"""Idle shares: what torch's schedules really call for, replayed with unit costs, against the papers' formulas."""

from __future__ import annotations

import pytest

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ConfigError
from trainwright.parallel.pipeline.order import Action, idle_formula, parts_of_rank, rank_of_part, replay
from trainwright.parallel.pipeline.schedule import check_micro_batches, recorded_orders

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"]
# 4 ranks, 8 micro-batches, 2 parts a rank where there are several: worked out by hand from the papers.
IDLE = {"gpipe": 3 / 11, "1f1b": 3 / 11, "interleaved_1f1b": 3 / 19, "zero_bubble": 3 / 51, "zbv": 3 / 51}
HELD = {
    "gpipe": [8, 8, 8, 8], "1f1b": [4, 3, 2, 1], "interleaved_1f1b": [11, 9, 7, 5], "zero_bubble": [8, 8, 8, 8],
    "zbv": [8, 8, 8, 8],
}  # fmt: skip


def settings(schedule: str, ranks: int = 4, virtual: int | None = None) -> ParallelConfig:
    return ParallelConfig(pipeline=ranks, pipeline_schedule=schedule, virtual_stages=virtual)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_replayed_idle_share_is_the_formulas(schedule: str) -> None:
    found = replay(recorded_orders(settings(schedule), 8))
    assert found.idle == pytest.approx(IDLE[schedule], rel=0.01)
    assert idle_formula(settings(schedule), 8) == pytest.approx(IDLE[schedule])
    assert found.held == HELD[schedule]


@pytest.mark.parametrize(("schedule", "ranks", "count", "virtual"), [
    ("gpipe", 2, 6, None), ("1f1b", 3, 9, None), ("interleaved_1f1b", 4, 16, 3), ("zero_bubble", 2, 8, 3),
    ("zbv", 3, 12, None),
])  # fmt: skip
def test_the_formula_holds_for_other_sizes(schedule: str, ranks: int, count: int, virtual: int | None) -> None:
    parallel = settings(schedule, ranks, virtual)
    assert replay(recorded_orders(parallel, count)).idle == pytest.approx(idle_formula(parallel, count), rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_part_computes_every_micro_batch_once(schedule: str) -> None:
    parallel = settings(schedule)
    for rank, actions in recorded_orders(parallel, 8).items():
        parts = parts_of_rank(rank, parallel)
        assert all(rank_of_part(part, parallel) == rank for part in parts)
        split = schedule in ("zero_bubble", "zbv")
        for kind in ("F", "I", "W") if split else ("F", "B"):
            done = [(action.part, action.micro_batch) for action in actions if action.kind == kind]
            assert sorted(done) == [(part, index) for part in parts for index in range(8)]


def test_a_replay_sees_waiting_ranks_and_impossible_orders() -> None:
    slow = {0: [Action("F", 0, 0), Action("B", 0, 0)], 1: [Action("F", 1, 0), Action("B", 1, 0)]}
    assert replay(slow).time == 6.0  # one micro-batch: nothing overlaps
    assert replay(slow).idle == 0.5
    with pytest.raises(AssertionError, match="wait for each other"):
        replay({0: [Action("B", 0, 0), Action("F", 0, 0)], 1: slow[1]})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_too_few_micro_batches_are_refused(schedule: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 micro-batches.*batch\.accumulation=16"):
        check_micro_batches(settings(schedule), 3)


def test_uneven_rounds_are_refused_with_a_number_that_works() -> None:
    with pytest.raises(ConfigError, match=r"(?s)9 micro-batches.*batch\.accumulation=8"):
        check_micro_batches(settings("interleaved_1f1b"), 9)
    check_micro_batches(settings("interleaved_1f1b"), 8)
    check_micro_batches(settings("zbv"), 9)
