"""A pipeline's idle time from the schedule that is executed: the order in which torch's schedule calls for each rank's
computations, replayed with what these cost under the plan.

The search itself reckons with the formulas of `step_time`, to which the replay is equal where all parts cost the same
(tests/unit/planner/test_replayed.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainwright.config.schema import ParallelConfig
from trainwright.parallel.pipeline.balance import partition
from trainwright.parallel.pipeline.order import INTERLEAVED, Action, replay
from trainwright.parallel.pipeline.schedule import recorded_orders
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.hardware import Device
from trainwright.planner.step_time import Costs, again_s
from trainwright.planner.workload import ModelShape, Plan, Schedule

_MOST_ACTIONS = 12_000
"""Of all ranks: torch takes seconds to lay out longer schedules."""


@dataclass(frozen=True)
class Replayed:
    """The micro-batches of one step through the pipeline."""

    seconds: float
    """Until the last rank is done: forwards, backwards, idle time, what is sent between the ranks."""
    idle: float
    """Share of the ranks' time in which they wait."""
    busy: Sequence[float]
    """Seconds in which each rank computes."""
    actions: int


def replayed(shape: ModelShape, plan: Plan, device: Device, constants: Constants = DEFAULT) -> Replayed | None:
    """None without a pipeline, and for schedules too long to lay out."""
    parts = plan.pipeline * plan.interleave
    if plan.pipeline == 1 or 2 * parts * plan.micro_batches > _MOST_ACTIONS:
        return None
    costs = Costs(shape, plan, device, constants)
    seconds = _seconds(costs, parts)
    orders = _orders(plan.pipeline, plan.pipeline_schedule, plan.interleave, plan.micro_batches)
    found = replay(orders, lambda action: seconds[action.kind, action.part], costs.passed_on() / 2)
    return Replayed(found.time, found.idle, found.busy, sum(map(len, orders.values())))


@functools.lru_cache(maxsize=32)
def _orders(pipeline: int, schedule: Schedule, interleave: int, micro_batches: int) -> Mapping[int, Sequence[Action]]:
    settings = ParallelConfig(
        pipeline=pipeline,
        pipeline_schedule=schedule,
        virtual_stages=interleave if schedule in INTERLEAVED else None,
    )
    return recorded_orders(settings, micro_batches)


def _seconds(costs: Costs, parts: int) -> dict[tuple[str, int], float]:
    """Of (F, B, I or W; part): its blocks, and the head's product and loss on the last one."""
    shape, plan = costs.shape, costs.plan
    products, attention, elementwise = costs.products(), costs.attention(), costs.elementwise()
    passes = 3 if plan.recompute == "full" else 2
    tensor = costs.constants.tensor_exposed * costs.tensor()
    context = costs.context(sum(attention)) / passes
    forward = products[0] + attention[0] + elementwise[0] + tensor + context
    backward = products[1] + attention[1] + elementwise[1] + (passes - 1) * (tensor + context)
    backward += again_s(plan, products[0], attention[0], elementwise[0])
    weights = products[1] / 2  # the other half of the products' backward is for their inputs
    head = costs.head() / 3
    block = {"F": forward, "B": backward, "I": backward - weights, "W": weights}
    if not plan.splits_backward:  # the whole backward runs in the first half's place
        block |= {"I": backward, "W": 0.0}
    ends = {
        "F": head,
        "B": 2 * head,
        "I": head if plan.splits_backward else 2 * head,
        "W": head if plan.splits_backward else 0.0,
    }
    held = _blocks(shape, parts)
    return {
        (kind, part): seconds * held[part] + (ends[kind] if part == parts - 1 else 0.0)
        for part in range(parts)
        for kind, seconds in block.items()
    }


def _blocks(shape: ModelShape, parts: int) -> list[int]:
    """Of each part, as the engine cuts the model (parallel/pipeline/balance.py)."""
    costs = [float(shape.block_parameters)] * shape.layers
    costs[0] += shape.dim
    costs[-1] += shape.dim + shape.embedding_parameters
    return [stop - start for start, stop in partition(costs, parts)]
