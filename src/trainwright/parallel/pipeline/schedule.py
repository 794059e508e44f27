"""torch's pipeline schedules: built for this rank's stages, or run dry for the order of their actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ConfigError
from trainwright.parallel.pipeline.order import Action, part_count, parts_of_rank

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def build_schedule(settings: ParallelConfig, stages: Sequence[Any], micro_batches: int) -> Any:
    """The schedule over this rank's stages. The last stage's output is the loss to differentiate; nothing is scaled.

    Raises ConfigError for a number of micro-batches that the schedule cannot run.
    """
    check_micro_batches(settings, micro_batches)
    single = settings.pipeline_schedule in ("gpipe", "1f1b")
    return _SCHEDULES[settings.pipeline_schedule](
        stages[0] if single else list(stages), micro_batches, loss_fn=_output_is_loss, scale_grads=False
    )


def _output_is_loss(output: Tensor, target: Any) -> Tensor:
    return output


def check_micro_batches(settings: ParallelConfig, count: int) -> None:
    """Raises ConfigError where the schedule cannot run `count` micro-batches."""
    ranks, name = settings.pipeline, settings.pipeline_schedule
    if count < ranks:
        raise ConfigError(
            f"{count} micro-batch{'es' if count > 1 else ''} a step with parallel.pipeline={ranks}",
            "the micro-batches of a step fill the pipeline: as many as it has ranks, better four times as many",
            f"batch.accumulation={4 * ranks}",
        )
    rounds = count // ranks
    if name in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        works = count // ranks * ranks
        raise ConfigError(
            f"{count} micro-batches a step with parallel.pipeline={ranks} and pipeline_schedule={name}",
            f"interleaved schedules go round in {rounds} equal rounds",
            f"batch.accumulation={works} (a multiple of parallel.pipeline)",
        )


def recorded_orders(settings: ParallelConfig, micro_batches: int) -> dict[int, list[Action]]:
    """The computations of every pipeline rank in the order in which torch's schedule calls for them.

    The schedule really runs, once for each rank, over stages that compute and send nothing and write down what they
    are asked for; it needs no processes.
    """
    orders: dict[int, list[Action]] = {}
    for rank in range(settings.pipeline):
        notes = orders[rank] = []
        stages = [_NotingStage(settings, rank, part, notes) for part in parts_of_rank(rank, settings)]
        index = torch.arange(micro_batches)
        build_schedule(settings, stages, micro_batches).step(index=index, target=index, return_outputs=False)
    return orders


class _NotingStage:
    """In the place of a `PipelineStage`."""

    def __init__(self, settings: ParallelConfig, rank: int, part: int, notes: list[Action]) -> None:
        self.stage_index, self.num_stages = part, part_count(settings)
        self.group_rank, self.group_size = rank, settings.pipeline
        self.is_first, self.is_last = part == 0, part == self.num_stages - 1
        self.device, self.submod, self.has_backward = torch.device("cpu"), nn.Identity(), True
        self.args_recv_info: dict[int, tuple[Any, ...]] = {0: ()}
        self.act_send_info: dict[int, list[Any]] = {}
        self._notes = notes

    def forward_one_chunk(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        self._notes.append(Action("F", self.stage_index, index))
        return torch.zeros(())

    def backward_one_chunk(self, index: int, full_backward: bool = True, **kwargs: Any) -> None:
        self._notes.append(Action("B" if full_backward else "I", self.stage_index, index))

    def backward_weight_one_chunk(self, index: int, **kwargs: Any) -> None:
        self._notes.append(Action("W", self.stage_index, index))

    def __getattr__(self, name: str) -> Any:
        """What prepares, sends or receives: nothing to do, no operations."""
        return lambda *args, **kwargs: []
