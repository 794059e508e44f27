"""Schedules: range, ends, continuity, warm-up; the user's own."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainwright.config.schema import LrScheduleConfig, OptimizerConfig
from trainwright.errors import ContradictionError, UsageError
from trainwright.optim.build import build_optimizer, use_optimizer
from trainwright.optim.handle import OptimizerHandle
from trainwright.optim.schedules import build_schedule, drive_lr

DECAYING = ("linear", "cosine", "wsd", "one_cycle", "polynomial")


@st.composite
def schedule_configs(draw: st.DrawFn) -> tuple[LrScheduleConfig, int]:
    name = draw(st.sampled_from((*DECAYING, "constant")))
    horizon = draw(st.integers(2, 5000))
    values: dict[str, Any] = {"name": name}
    share = draw(st.floats(0, 0.6))
    if draw(st.booleans()):
        values["warmup_fraction"] = min(share, (horizon - 1) / horizon - 0.5 / horizon)
    else:
        values["warmup_steps"] = int(share * (horizon - 1))
    if name != "constant":
        values["final_fraction"] = draw(st.floats(0, 1))
    if name == "wsd":
        values["decay_fraction"] = draw(st.floats(0.01, 0.3))
    if name == "polynomial":
        values["power"] = draw(st.floats(0.5, 3))
    return LrScheduleConfig(**values), horizon


@given(schedule_configs())
def test_range_ends_and_continuity(case: tuple[LrScheduleConfig, int]) -> None:
    config, horizon = case
    schedule = build_schedule(config, horizon)
    points = 400
    values = [schedule(horizon * i / points) for i in range(points + 1)]
    assert all(0.0 <= value <= 1.0 for value in values)
    warmup = schedule.warmup_steps
    assert schedule(warmup) == pytest.approx(1.0)
    assert schedule(horizon) == pytest.approx(config.final_fraction if config.name != "constant" else 1.0)
    assert schedule(horizon + 7) == pytest.approx(schedule(horizon))
    rising = [schedule(step) for step in range(warmup + 1)]
    assert rising == sorted(rising)
    assert rising[0] > 0, "no step is spent at a rate of 0"
    falling = [value for i, value in enumerate(values) if horizon * i / points >= warmup]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    # No jump: halving the distance between two points brings their factors together.
    for step in (warmup, 0.5 * horizon, (1 - config.decay_fraction) * horizon, horizon):
        near = 1e-9 * horizon
        assert abs(schedule(step + near) - schedule(max(0.0, step - near))) < 1e-3


def test_linear_decay_is_at_half_in_the_middle() -> None:
    """PEERS case 3, the schedule's part: a 10-step linear decay after 5 steps."""
    schedule = build_schedule(LrScheduleConfig(name="linear"), 10)
    assert [schedule(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_shapes_at_known_points() -> None:
    cosine = build_schedule(LrScheduleConfig(name="cosine", warmup_steps=10, final_fraction=0.1), 110)
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(0) == pytest.approx(1 / 11)
    wsd = build_schedule(LrScheduleConfig(name="wsd", decay_fraction=0.2), 100)
    assert [wsd(s) for s in (0, 79, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])
    polynomial = build_schedule(LrScheduleConfig(name="polynomial", power=2.0), 10)
    assert polynomial(5) == pytest.approx(0.25)
    one_cycle = build_schedule(LrScheduleConfig(name="one_cycle"), 100)
    assert one_cycle.warmup_steps == 30
    assert one_cycle(0) < 0.05
    assert one_cycle(65) == pytest.approx(0.5)
    assert build_schedule(LrScheduleConfig(warmup_steps=3), None)(10**9) == 1.0


@pytest.mark.parametrize(
    ("values", "horizon"),
    [
        ({"name": "cosine"}, None),
        ({"warmup_fraction": 0.1}, None),
        ({"name": "linear", "warmup_steps": 10}, 10),
        ({"name": "linear", "warmup_steps": 2, "warmup_fraction": 0.1}, 100),
        ({"name": "wsd", "warmup_steps": 90}, 100),
        ({"name": "constant", "final_fraction": 0.1}, 100),
        ({"name": "cosine", "decay_fraction": 0.5}, 100),
        ({"name": "cosine", "power": 2.0}, 100),
    ],
)
def test_contradictions_are_refused_with_a_remedy(values: dict[str, Any], horizon: int | None) -> None:
    with pytest.raises(ContradictionError) as caught:
        build_schedule(LrScheduleConfig(**values), horizon)
    assert caught.value.remedy


def _handle() -> tuple[nn.Linear, OptimizerHandle]:
    model = nn.Linear(3, 2)
    return model, build_optimizer(model.named_parameters(), OptimizerConfig(lr=0.5, name="sgd", weight_decay=0.0))


def test_a_users_function_drives_the_rate_and_is_checked() -> None:
    _, handle = _handle()
    drive_lr(lambda step: 1 / (step + 1), handle).before_step(3)
    assert handle.lr == 0.125
    for bad in (math.nan, -1.0, None):
        with pytest.raises(UsageError, match="factor"):
            drive_lr(lambda step, bad=bad: bad, handle).before_step(0)  # type: ignore[misc]
    with pytest.raises(UsageError, match="function from the step"):
        drive_lr("cosine", handle)  # type: ignore[arg-type]


def _torch_driver(kind: str) -> tuple[torch.optim.Optimizer, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lr_scheduler = torch.optim.lr_scheduler
    scheduler: Any
    if kind == "lambda":
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    elif kind == "multistep":
        scheduler = lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.1)
    elif kind == "one_cycle":
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=20)
    else:
        warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        scheduler = lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 10)], [3])
    names = {id(p): n for n, p in model.named_parameters()}
    handle = use_optimizer(optimizer, names, model.named_parameters())
    return optimizer, (handle, drive_lr(scheduler, handle))


@pytest.mark.parametrize("kind", ["lambda", "multistep", "one_cycle", "sequential"])
def test_a_torch_scheduler_resumes_through_json(kind: str) -> None:
    optimizer, (handle, driver) = _torch_driver(kind)
    rates = []
    state = scalars = ""
    for step in range(9):
        if step == 4:
            state, scalars = json.dumps(driver.state()), json.dumps(handle.scalars())
        driver.before_step(step)
        rates.append(optimizer.param_groups[0]["lr"])
        handle.step()
        driver.after_step()
    optimizer, (handle, driver) = _torch_driver(kind)
    handle.load_scalars(json.loads(scalars))
    driver.load_state(json.loads(state))
    resumed = []
    for step in range(4, 9):
        driver.before_step(step)
        resumed.append(optimizer.param_groups[0]["lr"])
        handle.step()
        driver.after_step()
    assert resumed == rates[4:]
    assert len(set(rates)) > 2


def test_torch_schedulers_that_cannot_act_are_refused() -> None:
    _, handle = _handle()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UsageError, match="another optimizer"):
        drive_lr(torch.optim.lr_scheduler.ConstantLR(other), handle)
    with pytest.raises(UsageError, match="ReduceLROnPlateau"):
        drive_lr(torch.optim.lr_scheduler.ReduceLROnPlateau(handle.optimizer), handle)  # type: ignore[arg-type]
