"""What a search has to choose from: every strategy that divides the ranks, the model and the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from trainwright.optim.blocks import BLOCK
from trainwright.parallel.pipeline.order import INTERLEAVED, SPLIT_BACKWARD
from trainwright.planner.job import Job
from trainwright.planner.workload import ModelShape, Offload, Plan, Recompute, Schedule

_SHORTEST_SLICE = 1024
"""Tokens of a sequence that a context rank should at least have: shorter slices are not tried."""
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


def layouts(job: Job) -> Iterator[Plan]:
    """Every strategy that divides the ranks and the model, without recomputation. What the config has settled is kept to, also
    where nobody would have tried it."""
    for tensor, pipeline, context in _degrees(job):
        data = job.cluster.ranks // (tensor * pipeline * context)
        if data > job.global_batch:
            continue
        rows = -(-job.global_batch // data)  # of a replica; a batch that does not divide is padded
        for micro_batch, count in _micro_batches(job, rows):
            if pipeline > 1 and count < pipeline:
                continue
            if job.fused_update and (pipeline > 1 or count > 1):
                continue
            for zero, replicate in _shardings(job, data, context, tensor):
                shards = data * context // replicate if zero else 1
                if not _vocabulary_fits(job.shape, tensor, shards) or not _blocks_fit(job, tensor, shards):
                    continue
                for schedule, interleave in _schedules(job, pipeline, count, zero):
                    yield Plan(
                        zero=zero,
                        data=data,
                        tensor=tensor,
                        sequence_parallel=tensor > 1 and job.sequence_parallel,
                        pipeline=pipeline,
                        interleave=interleave,
                        schedule=schedule,
                        context=context,
                        replicate=replicate,
                        sequence_length=job.sequence_length,
                        micro_batch=micro_batch,
                        micro_batches=count,
                        precision=job.precision,
                        compiled=job.compiled and not (schedule in SPLIT_BACKWARD and job.parts_backwards),
                        fused_loss=True,
                        fused_update=job.fused_update,
                        sharded_masters=True,
                        masters=job.masters,
                        moments=job.moments,
                        reduce_bytes=job.reduce_bytes,
                        ulysses=True,
                    )


def _choices(job: Job, name: str, usual: Iterable[int]) -> list[int]:
    return [job.fixed[name]] if name in job.fixed else list(usual)


def _degrees(job: Job) -> Iterator[tuple[int, int, int]]:
    """(tensor, pipeline, context) that divide the ranks, and the model's heads."""
    shape, ranks = job.shape, job.cluster.ranks
    most = 1 if job.precision == "fp8" else job.most_tensor  # float8's scales would be those of whole matrices
    # One degree beyond the node's, to say what that costs.
    usual_tensor = (n for n in _divisors(shape.kv_heads) if n <= 2 * job.cluster.device.per_node)
    for tensor in _choices(job, "tensor", usual_tensor):
        if tensor > most or any(size % tensor for size in (shape.heads, shape.kv_heads, shape.ffn_dim)):
            continue
        usual = (n for n in _divisors(shape.heads // tensor) if n == 1 or job.sequence_length // n >= _SHORTEST_SLICE)
        for context in _choices(job, "context", usual):
            if (shape.heads // tensor) % context or job.sequence_length % context:
                continue
            for pipeline in _choices(job, "pipeline", range(1, shape.layers + 1)):
                if pipeline <= shape.layers and ranks % (tensor * context * pipeline) == 0:
                    yield tensor, pipeline, context


def _micro_batches(job: Job, rows: int) -> list[tuple[int, int]]:
    """(sequences of a micro-batch, how many) of `rows` sequences, as data/plan.py splits them."""
    size, count = job.fixed.get("micro_batch"), job.fixed.get("micro_batches")
    if size is not None and count is not None:
        return [(size, count)] if size * count == rows else []
    if count is not None:
        return [(-(-rows // count), count)]
    found = []
    for n in [size] if size is not None else _divisors(rows):
        parts = -(-rows // n)
        found.append((-(-rows // parts), parts))
    return found


def _shardings(job: Job, data: int, context: int, tensor: int) -> list[tuple[int, int]]:
    """(ZeRO stage, copies of the shards): over all ranks, or over a node's, or eight nodes'."""
    ranks = data * context
    alone = (0, 3) if job.offloads else (0,)  # 3 alone: for what lives on the host
    stages = _choices(job, "zero", (0, 1, 2, 3) if ranks > 1 else alone)
    inside = max(1, job.cluster.device.per_node // tensor)
    usual = [1] + [ranks // shards for shards in (inside, 8 * inside) if 1 < shards < ranks and ranks % shards == 0]
    copies = [n for n in _choices(job, "replicate", usual) if data % n == 0]
    return [
        (zero, n) for zero in stages for n in copies if n == 1 or (zero and ranks // n > 1) or "replicate" in job.fixed
    ]


def _vocabulary_fits(shape: ModelShape, tensor: int, shards: int) -> bool:
    """Of a table that tensor ranks hold unevenly ZeRO shards the columns (parallel/zero.py)."""
    return shape.vocab_size % tensor == 0 or shape.dim % shards == 0


def _blocks_fit(job: Job, tensor: int, shards: int) -> bool:
    """Whether moments in 8 bits find whole blocks on every rank (optim/build.py refuses the rest)."""
    if job.moments != "8bit":
        return True
    shape = job.shape
    cut = [(shape.heads * shape.head_dim, tensor), (shape.ffn_dim, tensor)]  # columns of rowwise weights
    if shape.vocab_size % tensor:
        cut.append((shape.dim, shards))
    return not any(columns % BLOCK == 0 and (columns // ranks) % BLOCK for columns, ranks in cut)


def recomputes(job: Job, base: Plan) -> list[Recompute]:
    """What keeps most, and is fastest, first. Nobody parts the backward of what is recomputed."""
    usual = _RECOMPUTE[:1] if base.zero_bubble else _RECOMPUTE
    return [job.fixed["recompute"]] if "recompute" in job.fixed else list(usual)


def offloads(job: Job, base: Plan) -> list[Offload]:
    """What may live in the host's memory."""
    if "offload" in job.fixed:
        return [job.fixed["offload"]]
    if not job.offloads:
        return ["none"]
    if base.zero < 3:
        return ["none", "optimizer"]
    if (
        base.shards == 1 and "zero" not in job.fixed
    ):  # nothing is sharded: it is stage 0, but for what lives on the host
        return ["parameters"]
    return ["none", "optimizer", "parameters"]


def _schedules(job: Job, pipeline: int, micro_batches: int, zero: int) -> Iterator[tuple[Schedule | None, int]]:
    """(schedule, parts of the model a rank) of a pipeline, as the engine takes them (schedule.py's check_micro_batches)."""
    if pipeline == 1:
        yield None, 1
        return
    tried: list[tuple[Schedule, tuple[int, ...]]] = [("1f1b", (1,))]
    if job.schedule == "gpipe":
        tried.append(("gpipe", (1,)))
    split = zero < 3 and (job.parts_backwards or job.schedule in SPLIT_BACKWARD)
    if micro_batches % (micro_batches // pipeline) == 0:
        tried += [("interleaved_1f1b", (2, 4, 8))]
        tried += [("zero_bubble", (2, 4))] if split else []
    if split and (micro_batches >= 2 * pipeline - 1 or job.schedule == "zbv"):
        tried.append(("zbv", (2,)))
    for schedule, usual in tried:
        if job.schedule not in (None, schedule):
            continue
        for parts in _choices(job, "interleave", usual):
            if pipeline * parts <= job.shape.layers and (parts > 1) == (schedule in INTERLEAVED):
                yield schedule, parts


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
