"""The memory of one rank, by what it holds, at the peak of a step. In bytes.

Model states after Rajbhandari et al. 2020 (arXiv 1910.02054); a block's activations after Korthikanti et al. 2022
(2205.05198, equations 1 to 6), with fused attention and gated feed-forward blocks; micro-batches in flight after Narayanan
et al. 2021 (2104.04473).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.workload import ModelShape, Plan, Recompute, rank_blocks

GIB = 2.0**30
_CHUNK_TOKENS = 1024
"""Of the fused loss (fused/cross_entropy.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank of a pipeline that holds most."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    units: float
    """ZeRO 3's whole parameters of the blocks at work, and their gradients before reduction."""
    buffers: float
    """What libraries keep, and what the allocator holds and cannot use."""

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def memory(shape: ModelShape, plan: Plan, constants: Constants = DEFAULT) -> Memory:
    """At the peak of a step of `plan`."""
    c = constants
    states = _states(shape, plan, c)
    activations, logits = _activations(shape, plan, c)
    block, tables = shape.block_parameters / plan.tensor, shape.embedding_parameters / plan.tensor
    # One unit at work and one gathered ahead, and a gradient on its way.
    size = 4 if plan.precision == "fp32" else 2
    units = 2 * size * max(block, tables / 2) + 4 * block if plan.zero == 3 else 0.0
    held = sum(states) + activations + logits + units
    return Memory(*states, activations, logits, units, c.library_bytes + c.fragmentation * held)


def host_bytes(shape: ModelShape, plan: Plan) -> float:
    """What a rank keeps in its host's memory: a shard's masters, moments and gradients (optim/offload.py)."""
    if plan.offload == "none":
        return 0.0
    each = 2 * plan.master_bytes + plan.state_bytes
    return each * _held_parameters(shape, plan) / (plan.shards if plan.zero else 1)


def _most_blocks(shape: ModelShape, plan: Plan) -> int:
    if plan.sharded_masters:
        return max(rank_blocks(shape, plan.pipeline, plan.interleave, plan.schedule))
    return math.ceil(shape.layers / plan.pipeline)


def _states(shape: ModelShape, plan: Plan, c: Constants) -> tuple[float, float, float]:
    """(parameters, gradients, optimizer)."""
    if plan.offload == "parameters":
        return 0.0, 0.0, 0.0
    here = _held_parameters(shape, plan)
    whole, shard = here, here / plan.shards
    size = 4 if plan.precision == "fp32" else 2
    if plan.pure or (plan.precision == "fp32" and not plan.sharded_masters):
        parameters = size * (shard if plan.zero >= 3 else whole)
        gradients = size * (shard if plan.zero >= 2 else whole)
        optimizer = 2 * size * (shard if plan.zero >= 1 else whole)
    elif plan.zero == 3 or plan.sharded_masters:
        if plan.zero == 0:
            shard = whole
        # Copies stay where they are not gathered anew; one rank alone makes none in the masters' own format.
        plain = plan.ranks == 1 and plan.master_bytes == size == plan.reduce_bytes
        copies = plan.zero != 3 and not plain
        parameters = plan.master_bytes * shard + (size * whole if copies else 0)
        # Below stage 2 whole gradients wait for the last micro-batch, and are freed unit by unit as they are reduced.
        waits = plan.zero < 2 and plan.micro_batches > 1
        gradients = max(size, plan.reduce_bytes) * whole if waits else plan.master_bytes * shard
        optimizer = 0 if plan.offload == "optimizer" else plan.state_bytes * shard
    elif plan.zero == 2 and plan.pipeline > 1:  # torchtitan's: gathered once a step, and gradients wait
        parameters, gradients, optimizer = 4 * shard + 2 * whole, 4 * whole, 8 * shard
    else:
        parameters = 2 * whole
        gradients = c.gradient_bytes * (shard if plan.zero >= 2 else whole)
        optimizer = 12 * (shard if plan.zero >= 1 else whole)
    if plan.fused_update:  # a block's at a time; ours are reduced to fp32 shards first
        block = shape.block_parameters / plan.tensor
        gradients = 4 * block / (plan.shards if plan.zero else 1) if plan.sharded_masters else size * block
    return parameters, gradients, optimizer


def _held_parameters(shape: ModelShape, plan: Plan) -> float:
    """Of the pipeline's rank with most blocks, and a table."""
    tables = shape.embedding_parameters * (2 if plan.pipeline == 1 and not shape.tied else 1)
    return (_most_blocks(shape, plan) * shape.block_parameters + tables) / plan.tensor


def _activations(shape: ModelShape, plan: Plan, c: Constants) -> tuple[float, float]:
    """(kept for backward and at work in it, logits)."""
    tokens = plan.tokens_per_micro_batch / plan.context
    layers = _most_blocks(shape, plan)
    kept = layers * block_activations(shape, plan, plan.recompute)
    working = c.working * block_activations(shape, plan, "none")
    rows = min(tokens, _CHUNK_TOKENS) if plan.fused_loss else tokens
    logits = c.logits_bytes * rows * shape.vocab_size / plan.tensor
    if plan.pipeline == 1:
        return kept + working, logits
    passed_on = block_activations(shape, plan, "full")
    if plan.schedule == "gpipe":
        return plan.micro_batches * (kept + passed_on) + working, logits
    if plan.zero_bubble:  # all ranks keep as many, the last one too
        return plan.pipeline * (kept + passed_on) + working, logits
    # The first rank has as many micro-batches in flight as there are ranks, and a little more where they hold several parts.
    more = (plan.pipeline - 1) / (plan.pipeline * plan.interleave) if plan.interleave > 1 else 0.0
    flights = min(float(plan.micro_batches), plan.pipeline * (1 + more))
    first, last = flights * (kept + passed_on) + working, kept + working
    return (first, 0.0) if first > last + logits else (last, logits)


def block_activations(shape: ModelShape, plan: Plan, recompute: Recompute) -> float:
    """What one block keeps of a micro-batch for its backward, on one rank."""
    tokens = plan.tokens_per_micro_batch / plan.context
    size = 4 if plan.precision == "fp32" else 2
    t = plan.tensor
    stream = shape.dim / (t if plan.sequence_parallel else 1)
    if recompute == "full":
        return tokens * size * stream
    projections = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim / t
    if recompute == "selective" and plan.fused_attention:  # torch's: some products' results, and attention's
        return 0.7 * tokens * size * (2 * stream + projections + (2 if shape.gated else 1) * shape.ffn_dim / t)
    # Inputs of norms and of the first products; dropout's masks; what single kernels keep that fused ones do not.
    narrow = (4 if plan.compiled else 8) if plan.fused_attention else 5
    kept = tokens * size * (narrow * stream + projections + (4 if shape.gated else 2) * shape.ffn_dim / t)
    if plan.precision == "fp8":  # inputs of products in 8 bits
        kept *= 0.65
    if plan.fused_attention or recompute == "selective":
        return kept
    scores = plan.micro_batch * shape.heads / t * float(plan.sequence_length) ** 2 / plan.context
    return kept + 2.5 * size * scores  # softmax's result, dropout's and its mask
