"""All strategies that a job allows, and the fastest of those that fit: an exhaustive search, exact in what it prunes.

Pruned: recomputation that is not needed (what keeps more is faster, all else equal), and the time of what does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainwright.errors import ConfigError
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.hardware import Device, device_from_file, device_named
from trainwright.planner.memory import GIB, Memory, memory
from trainwright.planner.step_time import StepTime, step_time
from trainwright.planner.workload import ModelShape, Plan, Precision, Recompute

USABLE = 0.94
"""Share of a device's memory that a plan may fill."""
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
        if found is None or "0" in (found[1], found[2]):
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
    memory_gib: float | None = None
    """Instead of the device's."""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limit_bytes(self) -> float:
        """What a plan may fill of one device."""
        return USABLE * GIB * (self.memory_gib or self.cluster.device.memory_gib)


@dataclass(frozen=True)
class Candidate:
    """One strategy. `step` is None for one that does not fit."""

    plan: Plan
    memory: Memory
    step: StepTime | None

    @property
    def tokens_per_s(self) -> float:
        """A second, of all ranks; 0 for what does not fit."""
        return self.plan.tokens_per_step / self.step.total if self.step is not None else 0.0

    @property
    def kind(self) -> str:
        """What is shared besides the batch: the words of `KINDS`."""
        p = self.plan
        shared = [
            name
            for name, degree in (("tensor", p.tensor), ("pipeline", p.pipeline), ("context", p.context))
            if degree > 1
        ]
        if shared:
            return " + ".join(shared)
        if p.replicate > 1:
            return f"ZeRO {p.zero}, hybrid"
        return f"ZeRO {p.zero}" if p.data > 1 else "one rank"


@dataclass(frozen=True)
class Found:
    """What a search found. Lists run from the fastest to the slowest."""

    job: Job
    best: list[Candidate]
    """All that fit, with no more recomputation than they need."""
    kinds: dict[str, Candidate]
    """By kind: its fastest that fits, or that which comes nearest to fitting."""
    looked_at: int


def search(job: Job, constants: Constants = DEFAULT) -> Found:
    """All plans that fit, and the best of each kind."""
    device = job.cluster.device
    fastest: list[Candidate] = []
    kinds: dict[str, Candidate] = {}
    looked_at = 0
    for base in _layouts(job):
        for recompute in _RECOMPUTE:
            if job.fixed.get("recompute", recompute) != recompute:
                continue
            looked_at += 1
            plan = replace(base, recompute=recompute)
            held = memory(job.shape, plan, constants)
            fits = held.total <= job.limit_bytes
            found = Candidate(plan, held, step_time(job.shape, plan, device, constants) if fits else None)
            before = kinds.get(found.kind)
            if before is None or _better(found, before):
                kinds[found.kind] = found
            if fits:
                fastest.append(found)
                break
    fastest.sort(key=lambda c: -c.tokens_per_s)
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1].tokens_per_s))
    return Found(job, fastest, ordered, looked_at)


def _better(one: Candidate, other: Candidate) -> bool:
    if one.step is None and other.step is None:
        return one.memory.total < other.memory.total
    return one.tokens_per_s > other.tokens_per_s


# --- what there is to choose from ------------------------------------------------------------------------------------


def _layouts(job: Job) -> Iterator[Plan]:
    """Every strategy that divides the ranks, the model and the batch, without recomputation."""
    for tensor, pipeline, context in _degrees(job):
        data = job.cluster.ranks // (tensor * pipeline * context)
        if job.global_batch % data or data > job.global_batch:
            continue
        local = job.global_batch // data
        for micro_batch in _divisors(local):
            count = local // micro_batch
            if pipeline > 1 and count < pipeline:
                continue
            for zero, replicate in _shardings(data * context, tensor, job.cluster.device.per_node):
                for interleave in _interleaves(job.shape.layers, pipeline, count):
                    plan = Plan(
                        zero=zero,
                        data=data,
                        tensor=tensor,
                        sequence_parallel=tensor > 1,
                        pipeline=pipeline,
                        interleave=interleave,
                        context=context,
                        replicate=replicate,
                        sequence_length=job.sequence_length,
                        micro_batch=micro_batch,
                        micro_batches=count,
                        precision=job.precision,
                        compiled=job.compiled,
                        fused_loss=True,
                        sharded_masters=True,
                    )
                    if all(getattr(plan, name) == value for name, value in job.fixed.items() if name != "recompute"):
                        yield plan


def _degrees(job: Job) -> Iterator[tuple[int, int, int]]:
    """(tensor, pipeline, context) that divide the ranks, and the model's heads and layers."""
    shape, ranks = job.shape, job.cluster.ranks
    for tensor in _divisors(shape.kv_heads):
        if tensor > 1 and job.precision == "fp8":  # scales would be those of whole matrices
            continue
        for context in _divisors(shape.heads // tensor):
            if context > 1 and job.sequence_length // context < 1024:
                continue
            for pipeline in range(1, shape.layers + 1):
                if ranks % (tensor * context * pipeline) == 0:
                    yield tensor, pipeline, context


def _shardings(ranks: int, tensor: int, per_node: int) -> list[tuple[int, int]]:
    """(ZeRO stage, copies of the shards): over all ranks, or over a node's, or eight nodes'."""
    if ranks == 1:
        return [(0, 1)]
    found = [(zero, 1) for zero in (0, 1, 2, 3)]
    inside = max(1, per_node // tensor)
    for shards in (inside, 8 * inside):
        if 1 < shards < ranks and ranks % shards == 0:
            found += [(zero, ranks // shards) for zero in (1, 2, 3)]
    return found


def _interleaves(layers: int, pipeline: int, micro_batches: int) -> list[int]:
    if pipeline == 1:
        return [1]
    several = micro_batches % pipeline == 0
    return [v for v in (1, 2, 4, 8) if v == 1 or (several and pipeline * v <= layers)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
