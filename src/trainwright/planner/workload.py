"""What is trained, and how: a decoder's shape and a strategy, as numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from trainwright.optim.blocks import BLOCK
from trainwright.parallel.pipeline.order import holder

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "fp16", "bf16", "fp8"]
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"]
"""Of a pipeline, in the config's words (`parallel.pipeline_schedule`)."""
Masters = Literal["fp32", "bf16_stochastic", "bf16_kahan"]
Moments = Literal["fp32", "bf16", "8bit"]
Offload = Literal["none", "optimizer", "parameters"]
"""What lives in the host's memory: masters, moments and the update; or parameters and gradients as well, at stage 3."""


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder. Sizes are of the whole model."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    gated: bool
    """SwiGLU and its kin: three matrices in the feed-forward block, not two."""
    tied: bool
    head_size: int | None = None
    """Of a head, where it is not D / heads."""
    qk_norm: bool = False
    """Norms of queries and keys."""

    @property
    def head_dim(self) -> int:
        return self.head_size or self.dim // self.heads

    @property
    def block_parameters(self) -> int:
        """Matrices of one block; norms and biases are below a thousandth of them."""
        attention = self.dim * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.dim * self.ffn_dim

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.dim

    @property
    def parameters(self) -> int:
        return self.layers * self.block_parameters + self.embedding_parameters * (1 if self.tied else 2)

    def flops_per_token(self, sequence_length: int) -> float:
        """Of forward and backward, without recomputation: 6 a parameter of the matrices, and attention over the whole
        sequence (PaLM, arXiv 2204.02311, appendix B)."""
        matrices = self.layers * self.block_parameters + self.embedding_parameters
        return 6.0 * matrices + 12.0 * self.layers * self.heads * self.head_dim * sequence_length


@dataclass(frozen=True)
class Plan:
    """A strategy. The product of data, context, tensor and pipeline is the number of ranks."""

    zero: int
    data: int
    """Ranks over which the batch is split (ZeRO shards over `data * context / replicate`)."""
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    interleave: int = 1
    """Parts of the model a pipeline rank holds."""
    schedule: Schedule | None = None
    """None: interleaved_1f1b where a rank holds several parts, else 1f1b."""
    context: int = 1
    replicate: int = 1
    sequence_length: int = 2048
    micro_batch: int = 1
    """Sequences a forward pass of one replica."""
    micro_batches: int = 1
    """Forward passes an optimizer step."""
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    compiled: bool = True
    fused_attention: bool = True
    fused_loss: bool = False
    reduce_bytes: int = 4
    """Of a gradient on its way."""
    vendor_attention: bool = False
    """The device maker's own attention kernels, under Megatron and its kin."""
    sharded_masters: bool = False
    """fp32 parameters are what is sharded, and compute copies are made of them (FSDP2, and all of our stages); else 16-bit
    parameters with masters among the optimizer's states (Megatron, DeepSpeed). At stage 3 it is so anyway."""
    masters: Masters = "fp32"
    """Where they are what is sharded: as `precision.master` says."""
    moments: Moments = "fp32"
    """Adam's two, where masters are sharded."""
    pure: bool = False
    """Parameters, gradients and moments in 16 bits."""
    fused_update: bool = False
    """Updates in backward: a gradient lives until its block's is done."""
    ulysses: bool = False
    """Context parallelism by all-to-alls over the heads; else by a ring."""
    overlapped: bool = True
    """ZeRO's and data parallelism's transfers run beside computation."""
    offload: Offload = "none"

    @property
    def master_bytes(self) -> int:
        """Of a value, as it is sharded; its gradient, reduced, is as wide."""
        return 4 if self.masters == "fp32" else 2

    @property
    def state_bytes(self) -> float:
        """Of a matrix's value: what the optimizer keeps."""
        two = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / BLOCK}[self.moments]
        return two + (2 if self.masters == "bf16_kahan" else 0)

    @property
    def ranks(self) -> int:
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def pipeline_schedule(self) -> Schedule:
        """The schedule's name."""
        return self.schedule or ("interleaved_1f1b" if self.interleave > 1 else "1f1b")

    @property
    def splits_backward(self) -> bool:
        """It parts a backward in two, and fills the ranks' idle time with the second halves: not what is recomputed or
        compiled (parallel/pipeline/model.py)."""
        return self.zero_bubble and self.recompute == "none" and not self.compiled

    @property
    def zero_bubble(self) -> bool:
        """Its schedule is one of those."""
        return self.pipeline > 1 and self.schedule in ("zero_bubble", "zbv")

    @property
    def shards(self) -> int:
        return self.data * self.context // self.replicate

    @property
    def tokens_per_micro_batch(self) -> int:
        """Of one replica."""
        return self.micro_batch * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_micro_batch * self.micro_batches * self.data


@functools.lru_cache(maxsize=1024)
def rank_blocks(shape: ModelShape, pipeline: int, interleave: int, schedule: Schedule | None = None) -> tuple[int, ...]:
    """Blocks of each pipeline rank as our engine cuts them: the last part has the fewer the more its head costs, the others
    are as even as they come (parallel/pipeline/balance.py finds the same largest part)."""
    count = pipeline * interleave
    if count == 1:
        return (shape.layers,)
    head = shape.embedding_parameters / shape.block_parameters

    def largest(last: int) -> float:
        return max(last + head, -(-(shape.layers - last) // (count - 1)))

    last = min(range(1, shape.layers - count + 2), key=lambda n: (largest(n), -n), default=1)
    even, more = divmod(shape.layers - last, count - 1)
    parts = [even + (part < more) for part in range(count - 1)] + [last]
    held = [0] * pipeline
    for part, blocks in enumerate(parts):
        held[holder(part, pipeline, schedule or "")] += blocks
    return tuple(held)
