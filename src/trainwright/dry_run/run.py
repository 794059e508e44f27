"""A training step of one rank of many, with no machines: what it would hold and what it would send.

The real model is built under the real mesh as rank r of N, over torch's fake process group, and goes through the same
startup, `parallel/apply.py`, engine and optimizer as training does; its tensors have shapes and no memory.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from trainwright.config import Resolved
from trainwright.data.batch import Batch, BatchPlan
from trainwright.data.plan import plan_batches
from trainwright.dry_run.collectives import Collective
from trainwright.dry_run.live_bytes import KINDS
from trainwright.dry_run.step_watch import ReadsAsOne, StepWatch, watching
from trainwright.dry_run.timeline import Moment
from trainwright.dry_run.without_machines import (
    Message,
    allocating,
    first_message,
    settle,
    standing_for,
)
from trainwright.dry_run.work import Work
from trainwright.engine import Engine
from trainwright.errors import ConfigError, UsageError
from trainwright.mesh import AXES, resolve_degrees
from trainwright.models.build import build
from trainwright.models.deferred import build_on_meta
from trainwright.optim.compact_adamw import PART, CompactAdamW
from trainwright.parallel.pipeline.model import PipelineModel
from trainwright.startup import UserParts, build_engine
from trainwright.torch_private import fake_tensor_mode, without_chunks


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind of tensors on the rank."""

    kind: str
    """A key of `live_bytes.KINDS`."""
    between_steps_bytes: int
    at_update_bytes: int
    """When the optimizer begins."""
    at_peak_bytes: int
    """When the sum over all kinds is largest."""
    largest_bytes: int
    """This kind's own maximum."""


@dataclass(frozen=True)
class DryRun:
    """One rank's step."""

    world_size: int
    rank: int
    degrees: dict[str, int]
    """Axis of the mesh -> its size."""
    coordinates: dict[str, int]
    """Axis of the mesh -> the rank's place on it."""
    plan: BatchPlan
    sequence_length: int
    parameters: int
    """Of the whole model."""
    rank_parameters: int
    """Elements of this rank's shards, without padding."""
    memory: tuple[MemoryRow, ...]
    peak_phase: str
    """forward, backward or update."""
    timeline: tuple[Moment, ...]
    """What is held, at even distances in operators."""
    heap_at_peak_bytes: int
    heap_holes_bytes: int
    """On a CPU: what of the peak lies in the C library's heap, and how much more the kinds' own maxima there are together."""
    collectives: tuple[tuple[Collective, int], ...]
    """(kind, axis and size, how many a step)."""
    work: tuple[tuple[Work, float], ...]
    """(kind and size of an operator, how many a step)."""
    operators: int
    seconds_s: float
    process_memory_bytes: int
    """The largest resident set of the process that made the dry run."""
    notes: tuple[str, ...]

    @property
    def between_steps_bytes(self) -> int:
        return sum(row.between_steps_bytes for row in self.memory)

    @property
    def at_update_bytes(self) -> int:
        return sum(row.at_update_bytes for row in self.memory)

    @property
    def peak_bytes(self) -> int:
        return sum(row.at_peak_bytes for row in self.memory)

    @property
    def sent_bytes(self) -> int:
        """Over all collectives of a step."""
        return sum(collective.sent_bytes * count for collective, count in self.collectives)

    def to_json(self) -> dict[str, Any]:
        """Plain data, all sizes in bytes."""
        facts = {
            key: value
            for key, value in vars(self).items()
            if key not in ("plan", "memory", "collectives", "work", "timeline")
        }
        facts |= {
            key: getattr(self, key) for key in ("between_steps_bytes", "at_update_bytes", "peak_bytes", "sent_bytes")
        }
        facts["batch"] = asdict(self.plan)
        facts["timeline"] = [[moment.phase, moment.total_bytes] for moment in self.timeline]
        facts["memory"] = [asdict(row) for row in self.memory]
        facts["collectives"] = [
            {**asdict(collective), "count": count, "sent_bytes": collective.sent_bytes * count}
            for collective, count in self.collectives
        ]
        return facts


def dry_run(
    resolved: Resolved,
    world_size: int,
    rank: int = 0,
    *,
    model: Callable[[], nn.Module] | None = None,
    vocab_size: int | None = None,
    this_processor: bool = False,
) -> DryRun:
    """A step of `resolved`'s training as rank `rank` of `world_size`, once every state exists.

    model: a callable that builds it, where the config has none. vocab_size: the tokenizer's, as for training.
    this_processor: products as the CPU makes them that the dry run runs on (fused/linear.py), exchanges as CPUs make them
    (parallel/overlap.py); else as machines with the instructions and NCCL do.
    Raises ConfigError for a rank that does not exist and for whatever training would refuse; UsageError where a
    process group runs already.
    """
    began = time.perf_counter()
    resolved, notes = _without_machines(resolved, world_size, rank)
    config = resolved.config
    degrees = resolve_degrees(config.parallel, config.zero.stage, world_size)
    plan = plan_batches(config.batch, config.data.sequence_length, degrees.replicate * degrees.shard)
    case = _Case(resolved, plan, model, vocab_size)
    message: Message | None = None
    first_rank = rank % (world_size // degrees.pipeline)  # pipeline is the outermost axis
    if first_rank != rank:
        with standing_for(first_rank, world_size, this_processor):
            message = case.message(case.engine()[0])
    with standing_for(rank, world_size, this_processor):
        engine, total = case.engine()
        if degrees.pipeline > 1 and message is None:
            message = case.message(engine)
        watch = case.watched_step(engine, message)
        mesh = engine.parts.mesh.device_mesh
        coordinates = {axis: int(mesh.get_local_rank(axis)) for axis in AXES}
        local = [p.to_local() if isinstance(p, DTensor) else p for _, p in engine.parts.update.parameters]
        result = DryRun(
            world_size=world_size,
            rank=rank,
            degrees={axis: getattr(degrees, axis) for axis in AXES},
            coordinates=coordinates,
            plan=plan,
            sequence_length=config.data.sequence_length,
            parameters=total,
            rank_parameters=sum(p.numel() for p in local),
            memory=_rows(watch),
            peak_phase=watch.live.peak_phase,
            timeline=tuple(watch.live.timeline.moments),
            heap_at_peak_bytes=watch.live.heap_at_peak,
            heap_holes_bytes=watch.live.heap_holes_bytes,
            collectives=tuple(watch.log.sorted()),
            work=tuple(watch.work.counts.items()),
            operators=watch.operators,
            seconds_s=time.perf_counter() - began,
            process_memory_bytes=_resident_bytes(),
            notes=notes,
        )
        engine.close()
        del engine, local, mesh, watch
    return result


@dataclass(frozen=True)
class _Case:
    """What is built and run, whichever rank this process stands for."""

    resolved: Resolved
    plan: BatchPlan
    model: Callable[[], nn.Module] | None
    vocab_size: int | None
    fakes: Any = field(default_factory=fake_tensor_mode)

    def engine(self) -> tuple[Engine, int]:
        """The engine as training builds it, its shards fake, and the number of the whole model's parameters."""
        config = self.resolved.config
        if self.model is not None:
            module = build_on_meta(self.model, config.seed)
        elif config.model is not None:
            module = build(config.model, self.vocab_size)
        else:
            raise ConfigError("model is not set", "a dry run needs a model", "model.preset=llama-405b")
        total = sum(p.numel() for p in module.parameters())
        user = UserParts(load_weights=lambda _: None, allocate=allocating(self.fakes))
        with without_chunks():
            return build_engine(module, self.resolved, user, config.steps or 10**9, self.plan.accumulation), total

    def batch(self, rows: int) -> Batch:
        """Rows of tokens [rows, T], fake."""
        tokens = torch.zeros(rows, self.resolved.config.data.sequence_length, dtype=torch.int64)
        return Batch(tokens, tokens.clone(), None, torch.zeros(rows, dtype=torch.int64), 0)

    def message(self, engine: Engine) -> Message:
        """What the first stage of a pipeline sends on; `engine` is one of its ranks'."""
        with self.fakes:
            return first_message(engine, self.batch(self.plan.micro_size))

    def watched_step(self, engine: Engine, message: Message | None) -> StepWatch:
        """A step like the second one: all states are there, and what ranks agree on once is agreed on."""
        handle = engine.parts.update.optimizer
        with self.fakes:
            settle(engine)
            with torch.no_grad():
                for _, parameter in engine.parts.update.parameters:
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            if isinstance(handle.optimizer, CompactAdamW):
                handle.optimizer.part = PART  # by a CPU's small parts it would be many operators
            with ReadsAsOne():
                handle.step()
            handle.zero_grad()
            batch = self.batch(self.plan.rows)
            engine.resume_at(1, 0, float(self.plan.micro_size * batch.sequence_length))
            if message is not None:
                model = engine.parts.model
                assert isinstance(model, PipelineModel), "a mesh with a pipeline axis has a pipeline runner"
                model.expect(self.batch(self.plan.micro_size), message)  # nobody would answer an exchange
            with watching(engine, _vocab_size(engine), fake=True) as watch:
                engine.train_batch(batch)
        return watch


def _without_machines(resolved: Resolved, world_size: int, rank: int) -> tuple[Resolved, tuple[str, ...]]:
    """The config as a dry run takes it, and what that leaves out."""
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}", "a world has a rank at least", "--world-size 16384")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"--rank {rank} of --world-size {world_size}", "ranks count from 0", f"--rank {world_size - 1}"
        )
    if dist.is_initialized():
        raise UsageError(
            "a dry run while a process group runs",
            "it starts a fake one of its own",
            "call it before initialize(), or in a process of its own",
        )
    config, notes = resolved.config, []
    changes: dict[str, Any] = {"parallel__backend": "gloo"}
    if config.init_from is not None:
        changes["init_from"] = None
    if config.compile is not False:
        changes["compile"] = False
    if config.compile is True:
        notes.append("compile=true: the figures are those without it; fused kernels keep less")
    if config.fused.cuda_graphs:
        notes.append("fused.cuda_graphs=true: what the peak holds of activations is held between steps too")
    if config.offload != type(config.offload)():
        changes["offload"] = {}
        notes.append("offload: what lives in the host's memory, or on its disk, is counted with the rest")
    return resolved.replace("dry run", **changes), tuple(notes)


def _vocab_size(engine: Engine) -> int | None:
    sizes = (getattr(module, "vocab_size", None) for module in engine.module.modules())
    return next((size for size in sizes if isinstance(size, int)), None)


def _rows(watch: StepWatch) -> tuple[MemoryRow, ...]:
    live = watch.live
    moments = (live.before, live.at_update, live.at_peak, live.largest)
    rows = (MemoryRow(kind, *(moment[kind] for moment in moments)) for kind in KINDS)
    return tuple(row for row in rows if row.largest_bytes)


def _resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
