"""All strategies that a job allows, and the fastest of those that fit: an exhaustive search, exact in what it prunes.

Pruned: recomputation and offload that are not needed (what keeps more is faster, all else equal), and the time of what does
not fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainwright.errors import ConfigError
from trainwright.parallel.pipeline.order import INTERLEAVED
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.hardware import Device, device_from_file, device_named
from trainwright.planner.memory import GIB, Memory, host_bytes, memory
from trainwright.planner.step_time import StepTime, step_time
from trainwright.planner.workload import ModelShape, Offload, Plan, Precision, Recompute, Schedule

USABLE = 0.94
"""Share of a device's memory that a plan may fill."""
_SHORTEST_SLICE = 1024
"""Tokens of a sequence that a context rank should at least have: shorter slices are not tried."""
_SPLIT: frozenset[Schedule | None] = frozenset({"zero_bubble", "zbv"})
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Cluster:
    """So many of one device."""

    device: Device
    ranks: int

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """ "8xH100-80GB", or "16x8xH100-80GB" for 16 nodes of 8, or a device's YAML file in its name's place. Raises ConfigError."""
        found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z./~].*)", text)
        if found is None or 0 in (int(found[1] or 1), int(found[2] or 1)):
            raise ConfigError(f"--hardware {text}", "a number, an x and a device", "--hardware 8xH100-80GB")
        own = found[3].endswith((".yaml", ".yml"))
        device = device_from_file(Path(found[3]).expanduser()) if own else device_named(found[3])
        if found[1] and found[2]:
            device = replace(device, per_node=int(found[2]))
        return cls(device, int(found[1] or 1) * int(found[2] or 1))


@dataclass(frozen=True)
class Job:
    """What is given: model, machines, batch. `fixed` holds what the config has settled, by the names of `Plan`."""

    shape: ModelShape
    cluster: Cluster
    sequence_length: int
    global_batch: int
    """Sequences an optimizer step."""
    precision: Precision = "bf16"
    compiled: bool = True
    reduce_bytes: int = 4
    sequence_parallel: bool = True
    schedule: Schedule | None = None
    """The config's, where it says."""
    offloads: bool = True
    """Whether a search may move states to the host's memory: not what does not live there as the planner counts it."""
    most_tensor: int = 1 << 30
    """1 for a model that has no plan for tensor parallelism."""
    notes: tuple[str, ...] = ()
    """What the config says and the planner does not count."""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limit_bytes(self) -> float:
        """What a plan may fill of one device."""
        return USABLE * GIB * self.cluster.device.memory_gib

    @property
    def host_limit_bytes(self) -> float:
        """What a rank may fill of its host's memory."""
        return USABLE * GIB * self.cluster.device.host_gib


@dataclass(frozen=True)
class Candidate:
    """One strategy. `step` is None for one that does not fit."""

    plan: Plan
    memory: Memory
    step: StepTime | None
    tokens: int
    """Of a step."""
    crosses: bool = False
    """Its tensor ranks lie on several nodes."""

    @property
    def tokens_per_s(self) -> float:
        """A second, of all ranks, without padding; 0 for what does not fit."""
        return self.tokens / self.step.total if self.step is not None else 0.0

    @property
    def kind(self) -> str:
        """What is shared besides the batch, and what lives on the host, in words."""
        return self.plain_kind + _PLACES[self.plan.offload]

    @property
    def plain_kind(self) -> str:
        """The same without what lives on the host."""
        p = self.plan
        tensor = "tensor across nodes" if self.crosses else "tensor"
        pipeline = "zero-bubble pipeline" if p.zero_bubble else "pipeline"
        degrees = ((tensor, p.tensor), (pipeline, p.pipeline), ("context", p.context))
        if shared := " + ".join(name for name, degree in degrees if degree > 1):
            return shared
        if p.replicate > 1:
            return f"ZeRO {p.zero}, hybrid"
        return f"ZeRO {p.zero}" if p.data > 1 else "one rank"


_PLACES: dict[Offload, str] = {"none": "", "optimizer": ", states on the host", "parameters": ", all on the host"}


@dataclass(frozen=True)
class Found:
    """What a search found. Lists run from the fastest to the slowest."""

    job: Job
    best: list[Candidate]
    """All that fit, with no more recomputation than they need."""
    kinds: dict[str, Candidate]
    """By kind: its fastest that fits, or that which comes nearest to fitting. With the host's memory where it does not fit
    without."""
    looked_at: int


def search(job: Job, constants: Constants = DEFAULT) -> Found:
    """All plans that fit, and the best of each kind. Raises ConfigError where there is nothing to choose from."""
    device = job.cluster.device
    fastest: list[Candidate] = []
    kinds: dict[str, Candidate] = {}
    looked_at = 0
    for base in _layouts(job):
        modes = _recomputes(job, base)
        for offload in _offloads(job, base):
            for index, recompute in enumerate(modes):
                plan = replace(base, recompute=recompute, offload=offload)
                if host_bytes(job.shape, plan) > job.host_limit_bytes:
                    break
                looked_at += 1
                held = memory(job.shape, plan, constants)
                fits = held.total <= job.limit_bytes
                step = step_time(job.shape, plan, device, constants) if fits else None
                tokens, crosses = job.global_batch * job.sequence_length, plan.tensor > device.per_node
                found = Candidate(plan, held, step, tokens, crosses)
                before = kinds.get(found.kind)
                if before is None or _better(found, before):
                    kinds[found.kind] = found
                if fits:
                    fastest.append(found)
                    modes = modes[:index]  # offload is worth a try where it spares recomputation
                    break
    if not kinds:
        settled = ", ".join(f"{name}={value}" for name, value in job.fixed.items()) or "what the config says"
        raise ConfigError(
            f"no strategy with {settled} on {job.cluster.ranks:,} ranks for {job.global_batch:,} sequences",
            "degrees divide the ranks and the model's heads (and its feed-forward's width), a rank has a sequence at least, and a "
            "pipeline a micro-batch a rank",
            "leave one of them out, another number of ranks, or a larger batch.global_size",
        )
    fastest.sort(key=lambda c: -c.tokens_per_s)
    shown = {
        kind: c
        for kind, c in kinds.items()
        if kind == c.plain_kind or c.plain_kind not in kinds or (c.step and not kinds[c.plain_kind].step)
    }
    ordered = dict(sorted(shown.items(), key=lambda item: -item[1].tokens_per_s))
    return Found(job, fastest, ordered, looked_at)


def _better(one: Candidate, other: Candidate) -> bool:
    if one.step is None and other.step is None:
        return one.memory.total < other.memory.total
    return one.tokens_per_s > other.tokens_per_s


# --- what there is to choose from ------------------------------------------------------------------------------------


def _layouts(job: Job) -> Iterator[Plan]:
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
            for zero, replicate in _shardings(job, data, context, tensor):
                if not _vocabulary_fits(job.shape, tensor, data * context // replicate if zero else 1):
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
                        compiled=job.compiled and schedule not in _SPLIT,
                        fused_loss=True,
                        sharded_masters=True,
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
    stages = _choices(job, "zero", (0, 1, 2, 3) if ranks > 1 else (0,))
    inside = max(1, job.cluster.device.per_node // tensor)
    usual = [1] + [ranks // shards for shards in (inside, 8 * inside) if 1 < shards < ranks and ranks % shards == 0]
    copies = [n for n in _choices(job, "replicate", usual) if data % n == 0]
    return [
        (zero, n) for zero in stages for n in copies if n == 1 or (zero and ranks // n > 1) or "replicate" in job.fixed
    ]


def _vocabulary_fits(shape: ModelShape, tensor: int, shards: int) -> bool:
    """Of a table that tensor ranks hold unevenly ZeRO shards the columns (parallel/zero.py)."""
    return shape.vocab_size % tensor == 0 or shape.dim % shards == 0


def _recomputes(job: Job, base: Plan) -> list[Recompute]:
    """What keeps most, and is fastest, first. Nobody parts the backward of what is recomputed."""
    usual = _RECOMPUTE[:1] if base.zero_bubble else _RECOMPUTE
    return [job.fixed["recompute"]] if "recompute" in job.fixed else list(usual)


def _offloads(job: Job, base: Plan) -> list[Offload]:
    """The fastest first."""
    if "offload" in job.fixed:
        return [job.fixed["offload"]]
    if not job.offloads:
        return ["none"]
    return ["none", "optimizer", "parameters"] if base.zero == 3 else ["none", "optimizer"]


def _schedules(job: Job, pipeline: int, micro_batches: int, zero: int) -> Iterator[tuple[Schedule | None, int]]:
    """(schedule, parts of the model a rank) of a pipeline."""
    if pipeline == 1:
        yield None, 1
        return
    several = micro_batches % pipeline == 0
    tried: list[tuple[Schedule, tuple[int, ...]]] = [("1f1b", (1,))]
    if several:
        tried += [("interleaved_1f1b", (2, 4, 8))]
        tried += [("zero_bubble", (2, 4))] if zero < 3 else []
    if micro_batches >= 2 * pipeline - 1 and zero < 3:
        tried.append(("zbv", (2,)))
    if job.schedule is not None:
        tried = [(job.schedule, next((v for name, v in tried if name == job.schedule), (1,)))]
    for schedule, usual in tried:
        for parts in _choices(job, "interleave", usual):
            if pipeline * parts <= job.shape.layers and (parts > 1) == (schedule in INTERLEAVED):
                yield schedule, parts


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
