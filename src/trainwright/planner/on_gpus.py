"""A run on the GPUs that it starts on, by the catalogue: the strategy to take, or the forecast of the one that is settled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trainwright.config import Resolved
from trainwright.data.plan import plan_batches
from trainwright.errors import ConfigError
from trainwright.mesh import resolve_degrees
from trainwright.planner.constants import DEFAULT
from trainwright.planner.explain import describe, overrides, recommended
from trainwright.planner.from_config import job_of
from trainwright.planner.hardware import Device, device_named
from trainwright.planner.memory import GIB
from trainwright.planner.search import Candidate, Cluster, Found, Job, search

_SURE = 1.25
"""A forecast this far above a device's memory is refused; below, it may be wrong by as much (docs/planner.md), and only warned of."""


@dataclass(frozen=True)
class GpuForecast:
    """Of the strategy that a config has settled."""

    step_s: float
    memory_bytes: int
    """Of a rank at the peak, without what CUDA and its libraries keep for themselves."""
    warning: str | None


def choose(resolved: Resolved, world_size: int, local_ranks: int, vocab_size: int | None) -> tuple[dict[str, Any], str]:
    """(dotted key -> value of what the config leaves open, why). Raises ConfigError where nothing fits, and for GPUs and models that
    the catalogue does not know."""
    found = search(_job(resolved, world_size, local_ranks, vocab_size))
    taken = recommended(found)
    if taken is None or taken.step is None:
        raise _nothing_fits(found)
    pairs = [word.partition("=") for word in overrides(taken.plan, found.job.global_batch)]
    changes: dict[str, Any] = {
        key: int(value) if value.isdigit() else value for key, _, value in pairs if not resolved.was_set(key)
    }
    changes.pop("batch.global_size", None)
    return changes, (
        f"{describe(taken.plan)}: {taken.step.total * 1e3:,.0f} ms a step and {taken.memory.total / GIB:,.1f} GiB a GPU by the "
        f"catalogue's {found.job.cluster.device.name}, of {found.looked_at:,} strategies"
    )


def forecast(resolved: Resolved, world_size: int, local_ranks: int, vocab_size: int | None) -> GpuForecast | None:
    """Of `resolved` as it is; None for GPUs, models and settings that the catalogue does not know.

    Raises ConfigError for what cannot fit, with the nearest that does.
    """
    try:
        job = _settled(resolved, _job(resolved, world_size, local_ranks, vocab_size))
        kinds = search(job).kinds
    except ConfigError:
        return None
    candidate = next(iter(kinds.values()))
    total, capacity = candidate.memory.total, GIB * job.cluster.device.memory_gib
    if total > _SURE * capacity:
        raise _too_large(resolved, job, candidate)
    # The time of what does not fit for sure was left out.
    roomy = replace(job, cluster=Cluster(replace(job.cluster.device, memory_gib=1e6), world_size))
    step = next(iter(search(roomy).kinds.values())).step
    assert step is not None, "everything fits there"
    warning = None
    if total > job.limit_bytes:
        warning = (
            f"about {total / GIB:,.0f} GiB a GPU are forecast where {job.cluster.device.memory_gib:,.0f} are: recompute=full, a smaller "
            "batch.micro_size, or a higher zero.stage take less"
        )
    return GpuForecast(step.total, int(total - DEFAULT.library_bytes), warning)


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
    return replace(device, memory_gib=total / GIB, per_node=local_ranks)


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
        "micro_batch": plan.micro_size,
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
        "more GPUs, a shorter sequence, a smaller model, or offload.optimizer=disk",
    )


def _too_large(resolved: Resolved, job: Job, candidate: Candidate) -> ConfigError:
    found = search(replace(job, fixed={}, schedule=None))
    taken = recommended(found)
    if taken is None:
        return _nothing_fits(found)
    size = job.global_batch * resolved.config.outer.groups
    return ConfigError(
        f"a run that needs about {candidate.memory.total / GIB:,.0f} GiB a GPU ({describe(candidate.plan)}) where "
        f"{job.cluster.device.memory_gib:,.0f} are",
        "a run fits into the memory of its machines; nothing was allocated",
        f"{' '.join(overrides(taken.plan, size))} ({taken.memory.total / GIB:,.0f} GiB)",
    )
