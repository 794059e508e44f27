"""A run on the GPUs that it starts on, by the catalogue: the strategy to take, or the forecast of the one that is settled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trainwright.config import Resolved
from trainwright.data.plan import plan_batches
from trainwright.errors import ConfigError
from trainwright.mesh import resolve_degrees
from trainwright.planner.explain import describe, overrides, recommended
from trainwright.planner.from_config import job_of, setting
from trainwright.planner.hardware import Device, device_named
from trainwright.planner.job import Cluster, Job
from trainwright.planner.memory import GIB
from trainwright.planner.room import room_for
from trainwright.planner.search import Candidate, Found, search
from trainwright.planner.workload import Plan

_SURE = 1.25
"""A forecast this far above a device's memory is refused; below, it may be wrong by as much (docs/planner.md), and only warned of."""


@dataclass(frozen=True)
class GpuForecast:
    """Of the strategy that a config has settled."""

    step_s: float
    memory_bytes: int
    """Of a rank's tensors at the peak, without what CUDA, its libraries and the allocator keep for themselves."""
    checkpoint_bytes: int
    warning: str | None


def choose(
    resolved: Resolved, world_size: int, local_ranks: int, vocab_size: int | None
) -> tuple[dict[str, Any], str, GpuForecast]:
    """(dotted key -> value of what the config leaves open, why, its forecast). Raises ConfigError where nothing fits, and for GPUs and
    models that the catalogue does not know."""
    if resolved.config.model is None:
        raise ConfigError(
            "strategy=auto on GPUs with a model of one's own",
            "GPUs' figures are the catalogue's, for models that the config names",
            "model.preset or model.huggingface in the config, or strategy=manual",
        )
    found = search(_job(resolved, world_size, local_ranks, vocab_size))
    taken = recommended(found)
    if taken is None or taken.step is None:
        raise _nothing_fits(found)
    changes = {key: value for key, value in _settings(taken.plan, found.job).items() if not resolved.was_set(key)}
    why = (
        f"{describe(taken.plan)}: {taken.step.total * 1e3:,.0f} ms a step and {taken.memory.total / GIB:,.1f} GiB a GPU by the "
        f"catalogue's {found.job.cluster.device.name}, of {found.looked_at:,} strategies"
    )
    return changes, why, _forecast_of(taken, found.job)


def _settings(plan: Plan, job: Job) -> dict[str, Any]:
    """Dotted key -> value of the words for a plan, but for the batch's size."""
    pairs = (word.partition("=") for word in overrides(plan, job))
    return {key: int(v) if v.isdigit() else v for key, _, v in pairs if key != "batch.global_size"}


def forecast(resolved: Resolved, world_size: int, local_ranks: int, vocab_size: int | None) -> GpuForecast | None:
    """Of `resolved` as it is; None for GPUs, models and settings that the catalogue does not know.

    Raises ConfigError for what cannot fit, with the nearest that does.
    """
    try:
        job = _settled(resolved, _job(resolved, world_size, local_ranks, vocab_size))
        # On a device with room for all: the time of what does not fit would be left out.
        roomy = replace(job.cluster.device, memory_gib=1e6, host_gib=1e6)
        kinds = search(replace(job, cluster=Cluster(roomy, world_size))).kinds
    except ConfigError:
        return None
    candidate = next(iter(kinds.values()))
    if candidate.memory.total > _SURE * GIB * job.cluster.device.memory_gib:
        raise _too_large(resolved, job, candidate)
    return _forecast_of(candidate, job)


def _forecast_of(candidate: Candidate, job: Job) -> GpuForecast:
    assert candidate.step is not None, "it fits"
    held, warning = candidate.memory, None
    if held.total > job.limit_bytes:
        warning = (
            f"about {held.total / GIB:,.0f} GiB a GPU are forecast where {job.cluster.device.memory_gib:,.0f} are: recompute=full, "
            "a smaller batch.micro_size, or a higher zero.stage take less"
        )
    return GpuForecast(candidate.step.total, int(held.total - held.buffers), 12 * job.shape.parameters, warning)


def _job(resolved: Resolved, world_size: int, local_ranks: int, vocab_size: int | None) -> Job:
    return job_of(resolved, Cluster(_device(local_ranks), world_size), vocab_size)


def _device(local_ranks: int) -> Device:
    import torch

    name = torch.cuda.get_device_name()
    try:
        device = device_named(name)
    except ConfigError as error:
        rule = "the time of GPUs that the catalogue lacks is not known"
        raise ConfigError(
            f"strategy=auto on {name}", rule, "strategy=manual, or plan with --hardware FILE.yaml"
        ) from error
    _, total = torch.cuda.mem_get_info()
    host = room_for(local_ranks).memory_bytes
    return replace(device, memory_gib=total / GIB, per_node=local_ranks, host_gib=host / GIB)


def _settled(resolved: Resolved, job: Job) -> Job:
    """With all that the config says, its defaults too."""
    config = resolved.config
    parallel, degrees = config.parallel, resolve_degrees(config.parallel, config.zero.stage, job.cluster.ranks)
    plan = plan_batches(config.batch, job.sequence_length, degrees.replicate * degrees.shard)
    several = parallel.pipeline > 1 and parallel.pipeline_schedule not in ("gpipe", "1f1b")
    fixed = {
        "zero": config.zero.stage,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "replicate": parallel.replicate,
        "interleave": (parallel.virtual_stages or 2) if several else 1,
        "micro_batches": plan.accumulation,
        "recompute": config.recompute.mode,
        "offload": job.fixed.get("offload", "none"),
    }
    schedule = parallel.pipeline_schedule if parallel.pipeline > 1 else None
    return replace(job, fixed=fixed, schedule=schedule, global_batch=plan.global_size)


def _nothing_fits(found: Found) -> ConfigError:
    nearest = min(found.kinds.values(), key=lambda c: c.memory.total)
    job = found.job
    return ConfigError(
        f"nothing fits {job.cluster.ranks} x {job.cluster.device.name}: {describe(nearest.plan)} comes nearest with "
        f"{nearest.memory.total / GIB:,.0f} GiB of {job.limit_bytes / GIB:,.0f}",
        "a run fits into the memory of its machines",
        "more GPUs, a shorter sequence, a smaller model, or strategy=manual with offload.optimizer=disk",
    )


def _too_large(resolved: Resolved, job: Job, candidate: Candidate) -> ConfigError:
    open_job = replace(job, fixed={}, schedule=None)
    found = search(open_job)
    taken = recommended(found)
    if taken is None:
        return _nothing_fits(found)
    return ConfigError(
        f"a run that needs about {candidate.memory.total / GIB:,.0f} GiB a GPU ({describe(candidate.plan)}) where "
        f"{job.cluster.device.memory_gib:,.0f} are",
        "a run fits into the memory of its machines; nothing was allocated",
        f"{' '.join(_all_words(resolved, taken.plan, open_job))} ({taken.memory.total / GIB:,.0f} GiB)",
    )


def _all_words(resolved: Resolved, plan: Plan, job: Job) -> list[str]:
    """What turns `resolved` into `plan`, whatever it had settled."""
    several = plan.interleave > 1
    wanted = {f"parallel.{name}": getattr(plan, name) for name in ("tensor", "pipeline", "context", "replicate")} | {
        "zero.stage": plan.zero,
        "parallel.pipeline_schedule": plan.pipeline_schedule,
        "parallel.virtual_stages": plan.interleave if several else None,
        "recompute.mode": plan.recompute,
        "offload.optimizer": "cpu" if plan.offload == "optimizer" else "none",
        "offload.parameters": "cpu" if plan.offload == "parameters" else "none",
    }
    words = [f"{key}={'null' if v is None else v}" for key, v in wanted.items() if setting(resolved.config, key) != v]
    size = job.global_batch * resolved.config.outer.groups
    return [*words, f"'batch={{global_size: {size}, micro_size: {plan.micro_batch}}}'"]
