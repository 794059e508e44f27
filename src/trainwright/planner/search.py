"""The fastest of all strategies that fit: an exhaustive search, exact in what it prunes.

Pruned: recomputation and offload that are not needed (what keeps more is faster, all else equal), and the time of what does
not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainwright.errors import ConfigError
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.job import Job
from trainwright.planner.layouts import layouts, offloads, recomputes
from trainwright.planner.memory import GIB, Memory, host_bytes, memory
from trainwright.planner.step_time import StepTime, step_time
from trainwright.planner.workload import Offload, Plan


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
    most_on_host = 0.0
    for base in layouts(job):
        modes = recomputes(job, base)
        for offload in offloads(job, base):
            for index, recompute in enumerate(modes):
                plan = replace(base, recompute=recompute, offload=offload)
                on_host = host_bytes(job.shape, plan)
                if on_host > job.host_limit_bytes:
                    most_on_host = on_host
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
                    if offload == "none":
                        modes = modes[:index]  # offload is worth a try where it spares recomputation
                    break
    if not kinds and most_on_host:
        raise ConfigError(
            f"offload of {most_on_host / GIB:,.0f} GiB a rank where its share of the host's memory is {device.host_gib:,.0f} GiB",
            "what is offloaded fits there",
            "more ranks, a higher zero.stage, or a device's YAML file with host_gib",
        )
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
