"""The time of one optimizer step: products, attention, element-wise work, transfers hidden and exposed, the pipeline's idle.

Durations in seconds. Sources: FLOPs and recomputation, Korthikanti et al. 2022 (arXiv 2205.05198); the pipeline's idle
time, Narayanan et al. 2021 (2104.04473); ZeRO's volumes, Rajbhandari et al. 2020 (1910.02054); roofline, Williams et al.
2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from trainwright.parallel.pipeline.order import holder
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.hardware import Device
from trainwright.planner.workload import ModelShape, Plan, rank_blocks

_TILE = 128 * 256
"""Values of a product's result that one multiprocessor works on at a time."""
_KERNELS = 20
"""Of one pass over a block, fused; twice as many where they are not."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to."""

    products: float
    attention: float
    elementwise: float
    head: float
    recompute: float
    tensor: float
    context: float
    data: float
    pipeline: float
    optimizer: float
    offload: float = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


class Costs:
    """What a block, the head and a transfer of one plan cost on one kind of device."""

    def __init__(self, shape: ModelShape, plan: Plan, device: Device, constants: Constants) -> None:
        self.shape, self.plan, self.device, self.constants = shape, plan, device, constants
        self.tokens = plan.tokens_per_micro_batch / plan.context
        self.size = 4 if plan.precision == "fp32" else 2
        self._eight_bit = plan.precision == "fp8" and device.tflops_8bit is not None

    # --- computation -----------------------------------------------------------------------------------------------

    def product(self, m: float, n: float, k: float, eight_bit: bool = False) -> float:
        """[m, k] x [k, n]: as fast as the units go, or as memory does."""
        d, c = self.device, self.constants
        rate, half = d.tflops * 1e12 * d.product, c.reduction_half
        if self.plan.precision == "fp32":  # as TF32
            rate /= 2
        if eight_bit and d.tflops_8bit is not None:
            rate, half = d.tflops_8bit * 1e12 * d.product_8bit, 2 * half  # a tile's end costs what it did
        waves = m * n / _TILE / d.multiprocessors
        reached = k / (k + half) * waves / (waves + c.wave_loss)
        moved = (m * k + k * n + m * n) * self.size
        return max(2 * m * n * k / (rate * reached), moved / d.bandwidth)

    def linear(self, n: float, k: float, eight_bit: bool) -> tuple[float, float]:
        """(forward, backward) of a linear layer [k -> n] over a micro-batch."""
        forward = self.product(self.tokens, n, k, eight_bit)
        return forward, self.product(self.tokens, k, n, eight_bit) + self.product(n, k, self.tokens, eight_bit)

    def products(self) -> tuple[float, float]:
        """(forward, backward) of a block's linear layers."""
        s, t = self.shape, self.plan.tensor
        layers = [
            ((s.heads + 2 * s.kv_heads) * s.head_dim / t, s.dim),
            (s.dim, s.heads * s.head_dim / t),
            ((2 if s.gated else 1) * s.ffn_dim / t, s.dim),
            (s.dim, s.ffn_dim / t),
        ]
        times = [self.linear(n, k, self._eight_bit) for n, k in layers]
        return sum(forward for forward, _ in times), sum(backward for _, backward in times)

    def attention(self) -> tuple[float, float]:
        """(forward, backward) of a block's scores and their application. Fused, it skips what causality forbids."""
        s, p, d, c = self.shape, self.plan, self.device, self.constants
        scores = p.micro_batch * s.heads / p.tensor * float(p.sequence_length) ** 2 / p.context
        rate = d.tflops * 1e12 * d.product / (2 if p.precision == "fp32" else 1)
        if p.fused_attention:
            speed = d.attention * (c.vendor_attention if p.vendor_attention else 1)
            forward = 0.5 * 4 * scores * s.head_dim / (rate * speed) * (1 + c.context_loss * (p.context - 1))
            return forward, c.attention_backward * forward
        forward = (
            4 * scores * s.head_dim / (rate * c.score_products) + c.score_passes * scores * self.size / d.bandwidth
        )
        return forward, 2 * forward

    def elementwise(self) -> tuple[float, float]:
        """(forward, backward) of a block's norms, activations, residual sums, casts, and the gaps between its kernels."""
        s, p, d, c = self.shape, self.plan, self.device, self.constants
        narrow = c.elementwise * (1 if p.compiled else c.eager) * s.dim / (p.tensor if p.sequence_parallel else 1)
        wide = (3 if s.gated else 2) * s.ffn_dim / p.tensor
        moved = self.tokens * self.size * (narrow + wide)
        if self._eight_bit:  # of the products' inputs
            moved += self.tokens * 3 * (4 * s.dim + 2 * s.ffn_dim) / p.tensor
        forward = moved / d.bandwidth + c.gap_s * _KERNELS * (1 if p.compiled else 2)
        return forward, 2 * forward

    def head(self) -> float:
        """Forward and backward of the vocabulary's product and the loss over a micro-batch."""
        width = self.shape.vocab_size / self.plan.tensor
        passes = 4 * self.constants.logits_passes * self.tokens * width / self.device.bandwidth
        return sum(self.linear(width, self.shape.dim, eight_bit=False)) + passes

    # --- transfers -------------------------------------------------------------------------------------------------

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Of a ring over `ranks` that lie `stride` apart, bytes a second: between nodes all members in one share its links."""
        d, c = self.device, self.constants
        inside = d.node_bandwidth * c.link_share
        if ranks * stride <= d.per_node:
            return inside
        return min(inside, d.network_bandwidth * c.network_share * max(1, d.per_node // stride))

    def gather(self, size: float, ranks: int, stride: int) -> float:
        """All-gather or reduce-scatter of `size` bytes in all."""
        if ranks == 1:
            return 0.0
        hops = math.log2(ranks) + min(ranks, self.device.per_node)
        return size * (ranks - 1) / ranks / self.bandwidth(ranks, stride) + self.constants.latency_s * hops

    def tensor(self) -> float:
        """One pass over a block: two all-reduces, or a gather and a scatter for each."""
        return 4 * self.gather(self.tokens * self.shape.dim * self.size, self.plan.tensor, 1)

    def context(self, attention: float) -> float:
        """What context parallelism adds to a block, forward and backward: Ulysses' four all-to-alls a pass, which nothing
        hides, or a ring beside attention's work."""
        s, p = self.shape, self.plan
        if p.context == 1:
            return 0.0
        if p.ulysses:
            held = self.tokens * (2 * s.heads + 2 * s.kv_heads) * s.head_dim / p.tensor * self.size
            moved = held * (p.context - 1) / p.context / self.bandwidth(p.context, p.tensor)
            return (3 if p.recompute == "full" else 2) * (moved + 4 * self.constants.latency_s * p.context)
        kept = 2 * self.tokens * s.kv_heads * s.head_dim / p.tensor * self.size
        return self.beside(3 * self.gather(kept * p.context, p.context, p.tensor), 0.7 * attention)

    def passed_on(self) -> float:
        """A micro-batch's stream to the next stage of the pipeline, and its gradient back."""
        p, d, c = self.plan, self.device, self.constants
        far = p.ranks > d.per_node  # the slowest hop sets the pace
        rate = d.network_bandwidth * c.network_share if far else d.node_bandwidth * c.link_share
        return 2 * (self.tokens * self.shape.dim * self.size / p.tensor / rate + c.latency_s)

    def beside(self, transfer: float, computation: float) -> float:
        """What a transfer adds to the computation that it runs beside."""
        if not self.plan.overlapped:
            return transfer
        c = self.constants
        return max(0.0, transfer - c.overlap * computation) + c.contention * min(transfer, computation)


def step_time(shape: ModelShape, plan: Plan, device: Device, constants: Constants = DEFAULT) -> StepTime:
    """Of one optimizer step of `plan`."""
    costs = Costs(shape, plan, device, constants)
    products, attention, elementwise = costs.products(), costs.attention(), costs.elementwise()
    again = again_s(plan, products[0], attention[0], elementwise[0])
    tensor = constants.tensor_exposed * costs.tensor() * (3 if plan.recompute == "full" else 2)
    context = costs.context(sum(attention))
    blocks = shape.layers / plan.pipeline
    block_s = sum(products) + sum(attention) + sum(elementwise) + again + tensor + context
    stage_s, head = blocks * block_s, costs.head()
    slowest_s = _slowest_stage(shape, plan, block_s, head)
    way_s = stage_s + head / plan.pipeline
    # F + I - W where the weights' halves fill the rest: ZB-H1 of Qi et al. 2024 (arXiv 2401.10241).
    if plan.splits_backward:
        way_s -= blocks * products[1] + 2 / 3 * head / plan.pipeline
    idle = way_s * (plan.pipeline - 1) / plan.interleave
    if plan.pipeline > 1:
        idle += plan.micro_batches * plan.interleave * costs.passed_on()
    count = plan.micro_batches
    data, optimizer = _data_parallel(costs, slowest_s)
    nodes = max(1.0, plan.ranks / device.per_node)
    return StepTime(
        products=count * blocks * sum(products),
        attention=count * blocks * sum(attention),
        elementwise=count * blocks * sum(elementwise),
        head=count * (slowest_s - stage_s),
        recompute=count * blocks * again,
        tensor=count * blocks * tensor,
        context=count * blocks * context,
        data=data + constants.straggle * math.log2(nodes) * count * slowest_s,
        pipeline=idle,
        optimizer=0.0 if plan.offload != "none" else optimizer,
        offload=_offload(costs, slowest_s),
    )


def _slowest_stage(shape: ModelShape, plan: Plan, block_s: float, head: float) -> float:
    """Of a micro-batch on the pipeline rank that has most to do."""
    if plan.pipeline > 1 and plan.sharded_masters:  # ours are cut by what they cost
        ranks = rank_blocks(shape, plan.pipeline, plan.interleave, plan.schedule)
        last = ranks[holder(plan.pipeline * plan.interleave - 1, plan.pipeline, plan.schedule or "")]
        return max(max(ranks) * block_s, last * block_s + head)
    # Others': as many blocks a rank and the head besides, unless their number shows that the ends were spared some.
    spared = plan.pipeline > 1 and shape.layers % plan.pipeline != 0
    return shape.layers / plan.pipeline * block_s + (head / plan.pipeline if spared else head)


def again_s(plan: Plan, products: float, attention: float, elementwise: float) -> float:
    """A block's forward work that backward does once more."""
    if plan.recompute == "full":
        return products + attention + elementwise
    if plan.recompute == "selective":  # Megatron's: unfused attention; torch's: all but some products and attention
        return elementwise + 0.3 * products if plan.fused_attention else attention
    return 0.0


def _offload(costs: Costs, micro_batch_s: float) -> float:
    """The update on the host, and what travels there and back (optim/offload.py; at stage 3 FSDP2's policy)."""
    p, d = costs.plan, costs.device
    if p.offload == "none":
        return 0.0
    shard = costs.shape.parameters / p.tensor / p.pipeline / (p.shards if p.zero else 1)
    update = costs.constants.optimizer_bytes * shard / d.host_bandwidth
    link = d.host_link_bandwidth * costs.constants.link_share
    if p.offload == "optimizer":  # gradients there, masters back, before the next step begins
        return update + 8 * shard / link
    each = 12 * shard / link  # parameters for forward and backward, gradients back
    return update + p.micro_batches * costs.beside(each, micro_batch_s)


def _data_parallel(costs: Costs, micro_batch_s: float) -> tuple[float, float]:
    """(what ZeRO's and data parallelism's transfers add, the update) of a step."""
    s, p, d, c = costs.shape, costs.plan, costs.device, costs.constants
    here = s.parameters / p.tensor / p.pipeline
    update = c.optimizer_bytes * here / (p.shards if p.zero else 1) / d.bandwidth
    ranks = p.data * p.context
    if ranks == 1:
        return 0.0, update
    gather = costs.gather(costs.size * here, p.shards, p.tensor)
    reduce = costs.gather(p.reduce_bytes * here, p.shards, p.tensor)
    small = c.latency_s * (s.layers / p.pipeline + 2) * math.log2(ranks)
    between = 0.0
    if p.replicate > 1:
        between = 2 * costs.gather(p.reduce_bytes * here / p.shards, p.replicate, p.tensor * p.shards)
    # Ours at stage 2 reduces after each backward, as everybody does at stage 3; others' pipelines wait for the last one.
    reductions = p.micro_batches if p.zero == 3 or (p.zero == 2 and p.sharded_masters) else 1
    if p.zero == 3:  # gathered for each forward and each backward
        return reductions * (
            costs.beside(2 * gather + reduce + small, micro_batch_s) + costs.beside(between, micro_batch_s)
        ), update
    first = costs.beside((reduce if p.zero == 0 else gather) + reduce + between + small, micro_batch_s)
    return first + (reductions - 1) * costs.beside(reduce + between + small, micro_batch_s), update
