"""A search in words: the plan to take and why, what the others would need or cost, and the config that says it."""

from __future__ import annotations

from dataclasses import fields, replace

from trainwright.monitor.words import byte_size
from trainwright.planner.constants import DEFAULT
from trainwright.planner.job import Job
from trainwright.planner.memory import GIB, host_bytes
from trainwright.planner.search import Candidate, Found
from trainwright.planner.step_time import Costs
from trainwright.planner.workload import Plan

NEAR = 0.05
"""Plans this much slower than the fastest are as good: the model's own error is larger. The simplest of them is taken."""

_TIME_WORDS = {
    "products": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise work",
    "head": "the vocabulary's product and the loss",
    "recompute": "recomputation",
    "tensor": "tensor parallelism's transfers",
    "context": "context parallelism's transfers",
    "data": "ZeRO's and data parallelism's transfers",
    "pipeline": "the pipeline's idle time and transfers",
    "optimizer": "the update",
    "offload": "the update on the host, and the way there and back",
}


def recommended(found: Found) -> Candidate | None:
    """The simplest plan within `NEAR` of the fastest: fewest kinds of parallelism, then the least of each. None: nothing fits."""
    if not found.best:
        return None
    enough = (1 - NEAR) * found.best[0].tokens_per_s
    near = [c for c in found.best if c.tokens_per_s >= enough]
    return min(near, key=lambda c: (*_complexity(c.plan), -c.tokens_per_s))


def _complexity(plan: Plan) -> tuple[int, int, int]:
    degrees = (plan.tensor, plan.pipeline, plan.context, plan.replicate)
    kinds = sum(degree > 1 for degree in degrees) + (plan.offload != "none") + plan.zero_bubble
    return kinds, plan.tensor * plan.pipeline * plan.context, plan.interleave


def describe(plan: Plan) -> str:
    """Such as "ZeRO 2, tensor 8, pipeline 16 x 4 parts, 32 x 1 rows, recompute full": micro-batches and sequences of each."""
    parts = [f"ZeRO {plan.zero}" if plan.data * plan.context > 1 else "no ZeRO"]
    if plan.replicate > 1:
        parts[0] += f" in {plan.replicate} copies"
    if plan.tensor > 1:
        parts.append(f"tensor {plan.tensor}")
    if plan.pipeline > 1:
        schedule = f" {plan.schedule}" if plan.schedule not in (None, "1f1b", "interleaved_1f1b") else ""
        parts.append(
            f"pipeline {plan.pipeline}" + (f" x {plan.interleave} parts" if plan.interleave > 1 else "") + schedule
        )
    if plan.context > 1:
        parts.append(f"context {plan.context}")
    parts.append(f"{plan.micro_batches} x {plan.micro_batch} row{'s' if plan.micro_batch > 1 else ''}")
    if plan.recompute != "none":
        parts.append(f"recompute {plan.recompute}")
    if plan.offload != "none":
        parts.append("states on the host" if plan.offload == "optimizer" else "parameters and states on the host")
    return ", ".join(parts)


def why_not(found: Found, candidate: Candidate, taken: Candidate | None) -> str:
    """What keeps a kind of strategy from being the one to take."""
    if candidate.step is None:
        held, limit = candidate.memory.total / GIB, found.job.limit_bytes / GIB
        largest = max(fields(candidate.memory), key=lambda f: getattr(candidate.memory, f.name)).name
        return f"needs {held:,.0f} GiB of {limit:,.0f}, most of it {largest}"
    if taken is None or taken.step is None or candidate is taken:
        return ""
    slower = taken.tokens_per_s / candidate.tokens_per_s
    here, there = candidate.step, taken.step
    worst = max(fields(here), key=lambda f: getattr(here, f.name) - getattr(there, f.name)).name
    more = (getattr(here, worst) - getattr(there, worst)) / there.total
    if slower <= 1:
        return f"{1 / slower:.2f}x as fast, and less simple"
    return f"{slower:.2f}x slower: {_crossing(found, candidate.plan, worst)}{_TIME_WORDS[worst]} take {more:+.0%} of a step"


def _crossing(found: Found, plan: Plan, worst: str) -> str:
    """Such as "tensor 16 crosses the node (1.4x slower transfers); ": why transfers cost so much, if that is why."""
    job = found.job
    ranks, stride = {"tensor": (plan.tensor, 1), "context": (plan.context, plan.tensor)}.get(worst, (1, 1))
    inside = replace(job.cluster.device, per_node=ranks * stride)
    far, near = (Costs(job.shape, plan, d, DEFAULT).bandwidth(ranks, stride) for d in (job.cluster.device, inside))
    if near < 1.2 * far:
        return ""
    return f"{worst} {ranks} crosses the node ({near / far:.1f}x slower transfers); "


def breakdown(candidate: Candidate) -> list[tuple[str, float, float]]:
    """(what, seconds, share) of a step's time, the largest first."""
    assert candidate.step is not None
    step = candidate.step
    rows = [(_TIME_WORDS[f.name], getattr(step, f.name), getattr(step, f.name) / step.total) for f in fields(step)]
    return sorted(rows, key=lambda row: -row[1])


def overrides(plan: Plan, job: Job) -> list[str]:
    """The config's words for a plan, such as `train` takes them; what the job's config has settled may be among them."""
    words = [f"zero.stage={plan.zero}", f"batch.global_size={job.global_batch}"]
    if "micro_batches" not in job.fixed:  # one of both decides
        words.append(f"batch.micro_size={plan.micro_batch}")
    degrees = {name: getattr(plan, name) for name in ("tensor", "pipeline", "context", "replicate")}
    words += [f"parallel.{name}={degree}" for name, degree in degrees.items() if degree > 1]
    if plan.pipeline > 1 and plan.pipeline_schedule != "1f1b":
        words.append(f"parallel.pipeline_schedule={plan.pipeline_schedule}")
        words += [f"parallel.virtual_stages={plan.interleave}"] if plan.interleave > 1 else []
    if plan.offload != "none":
        words.append(f"offload.{plan.offload}=cpu")
    if plan.recompute != "none":
        words.append(f"recompute.mode={plan.recompute}")
    return words


def _nearest(found: Found) -> str:
    nearest = min(found.kinds.values(), key=lambda c: c.memory.total)
    return f"{describe(nearest.plan)}, {nearest.memory.total / GIB:,.0f} GiB of {found.job.limit_bytes / GIB:,.0f}"


def advice(found: Found, taken: Candidate | None) -> str:
    """One sentence for people: what the size of the model asks of these machines."""
    job = found.job
    states = byte_size(18 * job.shape.parameters)
    if taken is None:
        return (
            f"nothing fits: {job.shape.parameters / 1e9:.3g}B parameters need {states} of states alone, and these "
            f"devices have {job.cluster.ranks * job.limit_bytes / GIB:,.0f} GiB in all; more devices, a shorter sequence or "
            f"a smaller model. Nearest: {_nearest(found)}"
        )
    plan = taken.plan
    if plan.ranks == 1 and plan.offload == "none":
        return "the model and its states fit one device: nothing has to be shared"
    reasons = []
    if plan.zero and plan.data > 1:
        shared = {1: "optimizer states", 2: "optimizer states and gradients", 3: "parameters, gradients and states"}
        reasons.append(f"of {states} of states, {shared[plan.zero]} are spread over {plan.shards} ranks")
    if plan.tensor > 1:
        node = " of a node, where links are fast" if plan.tensor <= job.cluster.device.per_node else ", across nodes"
        reasons.append(f"matrices are cut over {plan.tensor} devices{node}")
    if plan.pipeline > 1:
        reasons.append(f"layers go to {plan.pipeline} groups of devices, which pass on little")
    if plan.context > 1:
        reasons.append(f"sequences of {plan.sequence_length:,} tokens are cut over {plan.context} ranks")
    if plan.offload != "none":
        reasons.append(
            f"{host_bytes(job.shape, plan) / GIB:,.0f} GiB a rank live in the host's memory, where the update is made"
        )
    return "; ".join(reasons) or "every rank holds the whole model, and the batch is shared"
