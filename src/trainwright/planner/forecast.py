"""What the run that a config describes will take of this machine: the bytes and the time of a rank's step, before it starts.

The real model goes through the real strategy on fake tensors (dry_run/), so that whatever is trained is what is counted:
any model, recomputation, precision, fused or whole loss. Its operators and collectives are then timed at the rates that
were measured here (processor.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from trainwright.config import Resolved
from trainwright.data.plan import plan_batches
from trainwright.dry_run.run import DryRun, dry_run
from trainwright.mesh import resolve_degrees
from trainwright.planner.processor import ProcessorTime, Rates, processor_time

_HOLES = 0.8
"""Of what the kinds' own maxima are more than the peak, in the C library's heap: activations, gradients and working memory
live at different times, and one kind's holes seldom fit another's blocks. This and the next are fitted to
benchmarks/planner_here.py; where each block has pages of its own (MALLOC_MMAP_THRESHOLD_), the share is 0.1."""
_KERNELS_BYTES = 21_000_000
"""What matrix products pack their operands into."""
_PROCESS_BYTES = 50_000_000
"""`Rates.process_bytes` where nothing was measured."""
_FEW = 3
"""Micro-batches of a step that are gone through: the first, the last, and one that stands for those in between."""


@dataclass(frozen=True)
class Forecast:
    """Of one rank's step."""

    memory_bytes: int
    """At the peak, beyond what the process holds before it has a model."""
    time: ProcessorTime | None
    """None where no rates are known, and for pipelines, whose idle time is no rank's own work."""
    run: DryRun


def forecast(
    resolved: Resolved,
    world_size: int,
    rates: Rates | None = None,
    *,
    model: Callable[[], nn.Module] | None = None,
    vocab_size: int | None = None,
) -> Forecast:
    """Of the rank of `world_size`, on CPUs, that holds most. rates: those of as many ranks a machine as the job will have there.

    Raises what training with this config would refuse.
    """
    few, times = _shortened(resolved, world_size)
    pipeline = resolved.config.parallel.pipeline

    def rank_of(config: Resolved, rank: int) -> DryRun:
        return dry_run(config, world_size, rank, model=model, vocab_size=vocab_size, this_processor=True)

    # A pipeline's first rank has most micro-batches in flight, its last one the logits.
    run = max((rank_of(few, rank) for rank in ({0, world_size - 1} if pipeline > 1 else {0})), key=_memory)
    time = None
    if rates is not None and pipeline == 1:
        time = processor_time(rates, run.work, run.collectives, run.operators)
        if times:  # those that were left out take what the third of three adds to two
            less = rank_of(_with_micro_batches(resolved, world_size, _FEW - 1), 0)
            time = time.extended(processor_time(rates, less.work, less.collectives, less.operators), times)
    beside = rates.process_bytes if rates is not None else _PROCESS_BYTES
    return Forecast(_memory(run) + beside, time, run)


def _memory(run: DryRun) -> int:
    return run.peak_bytes + int(_HOLES * run.heap_holes_bytes) + _KERNELS_BYTES


def _shortened(resolved: Resolved, world_size: int) -> tuple[Resolved, int]:
    """(a config of few micro-batches a step, how many were left out)."""
    config = resolved.config
    degrees = resolve_degrees(config.parallel, config.zero.stage, world_size)
    count = plan_batches(config.batch, config.data.sequence_length, degrees.replicate * degrees.shard).accumulation
    if count <= _FEW or degrees.pipeline > 1:
        return resolved, 0
    return _with_micro_batches(resolved, world_size, _FEW), count - _FEW


def _with_micro_batches(resolved: Resolved, world_size: int, count: int) -> Resolved:
    config = resolved.config
    degrees = resolve_degrees(config.parallel, config.zero.stage, world_size)
    plan = plan_batches(config.batch, config.data.sequence_length, degrees.replicate * degrees.shard)
    batch = {"micro_size": plan.micro_size, "accumulation": count}
    return resolved.replace("forecast", batch=batch)
