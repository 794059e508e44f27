"""The model's free constants, of all devices alike: each with its meaning.

Fitted to the published runs in benchmarks/published.csv, with a pull towards what each would be by its meaning
(`python benchmarks/planner.py --fit`; docs/planner.md has the method and the errors, cross-validated).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Of time, then of memory."""

    reduction_half: float = 99.0
    """Length of a product's inner dimension at which half of the speed is reached: the ends of its tiles."""
    wave_loss: float = 0.45
    """Waves of tiles that a product takes longer than its tiles fill: the last one is seldom full, the first one is cold."""
    elementwise: float = 31.0
    """Values read and written a token, block and unit of width, forward, by element-wise kernels."""
    eager: float = 1.1
    """The same work kernel by kernel, over fused or compiled."""
    gap_s: float = 2e-06
    """Between one kernel and the next, on the device."""
    attention_backward: float = 3.1
    """Fused attention's backward over its forward; 2.5 by its FLOPs (Dao 2023, arXiv 2307.08691)."""
    vendor_attention: float = 1.8
    """Speed of the maker's own attention kernels over FlashAttention 2."""
    score_products: float = 0.45
    """Speed of the two products of attention that is not fused, over a large one's."""
    score_passes: float = 4.2
    """Passes over the matrix of scores, forward, of attention that is not fused."""
    context_loss: float = 0.039
    """Time that attention in slices takes more, for each further slice."""
    logits_passes: float = 2.9
    """Passes over fp32 logits, forward and backward."""
    optimizer_bytes: float = 28.0
    """Read and written a parameter by the update."""
    tensor_exposed: float = 0.34
    """Share of tensor parallelism's transfers that no computation hides."""
    link_share: float = 0.79
    """Share of a link's rated bandwidth that large collectives reach within a node."""
    network_share: float = 0.87
    """The same between nodes."""
    overlap: float = 0.93
    """Share of computation beside which ZeRO's transfers run."""
    contention: float = 0.17
    """Share of a hidden transfer's time by which it slows the computation beside it."""
    latency_s: float = 4.6e-06
    """Of one hop of a collective."""
    straggle: float = 0.0094
    """Share of a step that each doubling of the number of nodes costs: the slowest sets the pace."""

    gradient_bytes: float = 4.0
    """A parameter's gradient where it is accumulated beside 16-bit parameters (Megatron's, DeepSpeed's)."""
    logits_bytes: float = 10.0
    """A logit where the loss is not fused: 16 bits, fp32 and its gradient."""
    working: float = 2.0
    """Activations and their gradients of the block at work in backward, over the activations that a block keeps."""
    library_bytes: float = 2.0e9
    """CUDA's context, cuBLAS's and NCCL's buffers."""
    fragmentation: float = 0.04
    """What the allocator holds and cannot use, over the rest."""


DEFAULT = Constants()
