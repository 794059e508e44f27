"""The pipeline's idle time by replaying the schedule that is executed, against the search's formula."""

from __future__ import annotations

import pytest

from trainwright.planner.constants import DEFAULT
from trainwright.planner.hardware import DEVICES
from trainwright.planner.replayed import replayed
from trainwright.planner.step_time import Costs, step_time
from trainwright.planner.workload import ModelShape, Plan, Schedule

H100 = DEVICES["H100-80GB"]
EVEN = ModelShape(32, 4096, 32, 8, 14336, 32, gated=True, tied=False)
"""With next to no head: all parts cost the same."""
UNEVEN = ModelShape(32, 4096, 32, 8, 14336, 128256, gated=True, tied=False)


def _plan(schedule: Schedule, parts: int, micro_batches: int, recompute: str = "none") -> Plan:
    compiled = schedule not in ("zero_bubble", "zbv")
    return Plan(
        zero=1, data=8, pipeline=4, interleave=parts, schedule=schedule, sequence_length=8192, micro_batches=micro_batches,
        recompute=recompute, compiled=compiled, fused_loss=True, sharded_masters=True,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("micro_batches", [8, 16])
@pytest.mark.parametrize(
    ("schedule", "parts"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("zero_bubble", 2), ("zbv", 2)],
)
def test_even_parts_idle_as_the_formula_says(schedule: Schedule, parts: int, micro_batches: int) -> None:
    plan = _plan(schedule, parts, micro_batches)
    found, step = replayed(EVEN, plan, H100), step_time(EVEN, plan, H100)
    assert found is not None
    formula = step.total - step.optimizer - step.data
    assert found.seconds == pytest.approx(formula, rel=0.05)
    way = 2 * micro_batches * parts * Costs(EVEN, plan, H100, DEFAULT).passed_on() / 2
    assert found.idle * found.seconds == pytest.approx(step.pipeline, rel=0.25, abs=way)
    assert found.actions >= 2 * 4 * parts * micro_batches


def test_the_order_of_the_schedules_is_the_formulas() -> None:
    plans = [_plan("1f1b", 1, 8), _plan("interleaved_1f1b", 2, 8), _plan("zero_bubble", 2, 8)]
    idle = [found.idle for found in (replayed(EVEN, plan, H100) for plan in plans) if found is not None]
    assert idle == sorted(idle, reverse=True)
    assert idle[0] > 2 * idle[2]


def test_a_dear_head_lets_the_other_ranks_wait() -> None:
    plan = _plan("1f1b", 1, 8)
    even, uneven = replayed(EVEN, plan, H100), replayed(UNEVEN, plan, H100)
    assert even is not None
    assert uneven is not None
    assert uneven.idle > even.idle
    assert max(uneven.busy) > 1.02 * min(uneven.busy)
    assert uneven.seconds == pytest.approx(
        sum(vars(step_time(UNEVEN, plan, H100))[k] for k in ("products", "attention", "elementwise", "head", "pipeline")), rel=0.1
    )  # fmt: skip


def test_what_is_recomputed_is_not_parted() -> None:
    whole = replayed(EVEN, _plan("zero_bubble", 2, 8, "full"), H100)
    parted = replayed(EVEN, _plan("zero_bubble", 2, 8), H100)
    assert whole is not None
    assert parted is not None
    assert whole.idle > 1.4 * parted.idle


def test_no_pipeline_and_long_schedules_are_not_replayed() -> None:
    assert replayed(EVEN, Plan(zero=1, data=8), H100) is None
    assert replayed(EVEN, _plan("1f1b", 1, 10_000), H100) is None
