"""Which constraint to relax first: how much faster the plan to take would be with more of one thing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainwright.errors import ConfigError
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.explain import describe, recommended
from trainwright.planner.job import Cluster, Job
from trainwright.planner.search import Found, search


@dataclass(frozen=True)
class Relaxed:
    """The best plan with one constraint relaxed."""

    what: str
    gain: float
    """Tokens a second and device over those of the plan to take, less one."""
    plan: str
    """What would be taken then."""


def sensitivity(found: Found, constants: Constants = DEFAULT) -> list[Relaxed]:
    """The largest gain first; one search each. Empty where nothing fits as it is."""
    taken = recommended(found)
    if taken is None:
        return []
    now = taken.tokens_per_s / taken.plan.ranks
    results = []
    for what, job in _relaxed(found.job):
        try:
            other = recommended(search(job, constants))
        except ConfigError:  # nothing divides
            continue
        if other is not None:
            gain = other.tokens_per_s / other.plan.ranks / now - 1
            results.append(Relaxed(what, gain, describe(other.plan)))
    return sorted(results, key=lambda relaxed: -relaxed.gain)


def _relaxed(job: Job) -> list[tuple[str, Job]]:
    device, cluster = job.cluster.device, job.cluster
    changes = [
        ("twice the global batch", replace(job, global_batch=2 * job.global_batch)),
        ("half as many devices", replace(job, cluster=Cluster(device, cluster.ranks // 2)) if cluster.ranks > 1 else None),
        ("a quarter more memory", _with(job, memory_gib=1.25 * device.memory_gib)),
        ("memory twice as fast", _with(job, bandwidth=2 * device.bandwidth)),
    ]  # fmt: skip
    if cluster.ranks > device.per_node:
        changes.append(("a network twice as fast", _with(job, network_bandwidth=2 * device.network_bandwidth)))
    if cluster.ranks > 1:
        changes.append(("links in a node twice as fast", _with(job, node_bandwidth=2 * device.node_bandwidth)))
    return [(what, changed) for what, changed in changes if changed is not None]


def _with(job: Job, **device: float) -> Job:
    return replace(job, cluster=Cluster(replace(job.cluster.device, **device), job.cluster.ranks))  # type: ignore[arg-type]
