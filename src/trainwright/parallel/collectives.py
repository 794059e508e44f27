"""Collectives with their gradients: of tensor parallelism (arXiv 1909.08053; the sequence forms: 2205.05198), and of
context parallelism.

Activations are plain tensors. Each pair below is the other's backward:

| forward | backward |
|---|---|
| `enter`: identity | sum over the ranks |
| `reduce`: sum over the ranks | identity |
| `gather_sequence`: slices of the sequence -> all of it | sum over the ranks, cut into slices |
| `scatter_sequence`: sum over the ranks, cut into slices | slices of the sequence -> all of it |
| `gather_features`: slices of the last dimension -> all of it | this rank's slice |
| `split_features`: this rank's slice of the last dimension | slices of the last dimension -> all of it |

`all_to_all` is its own inverse; `gather_slices` is for what every rank then computes alike. Where each rank adds to one
loss, `reduce` sums what they have.

A dimension is cut by torch.chunk's rule; a sequence that does not divide is padded with zero rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainwright.torch_private.collectives import (
    all_gather_chunks,
    all_reduce_sum,
    all_to_all_chunks,
    reduce_scatter_sum,
)


@dataclass(frozen=True)
class GroupRanks:
    """The ranks of one mesh axis (that share each matrix, or each sequence), and this one's place among them."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def largest(self, length: int) -> int:
        """What the fullest rank has of a dimension of `length`."""
        return -(-length // self.size)

    def first(self, length: int) -> int:
        """Where this rank's part of a dimension of `length` begins."""
        return min(length, self.rank * self.largest(length))

    def here(self, length: int) -> int:
        """How much of a dimension of `length` this rank has."""
        return min(length, (self.rank + 1) * self.largest(length)) - self.first(length)


def enter(x: Tensor, ranks: GroupRanks) -> Tensor:
    """`x`, the same on all ranks, as it goes into computations of which each rank makes a part."""
    return _Enter.apply(x, ranks) if x.requires_grad else x


def reduce(x: Tensor, ranks: GroupRanks) -> Tensor:
    """The sum of all ranks' `x`."""
    return _Reduce.apply(x, ranks)


def gather_sequence(x: Float[Tensor, "B S D"], ranks: GroupRanks, length: int) -> Float[Tensor, "B T D"]:
    """All T = `length` positions from slices of S = ceil(T / N); each rank then computes a part with all of them."""
    return _GatherSequence.apply(x, ranks, length)


def scatter_sequence(x: Float[Tensor, "B T D"], ranks: GroupRanks) -> Float[Tensor, "B S D"]:
    """This rank's S = ceil(T / N) positions of the sum of all ranks' `x`; zeros beyond T."""
    return _ScatterSequence.apply(x, ranks)


def gather_features(x: Tensor, ranks: GroupRanks, width: int) -> Tensor:
    """[..., width] from each rank's part of the last dimension; what follows is computed alike on all ranks."""
    return _GatherFeatures.apply(x, ranks, width)


def split_features(x: Tensor, ranks: GroupRanks) -> Tensor:
    """This rank's part of the last dimension of `x`, which is the same on all ranks."""
    return _SplitFeatures.apply(x, ranks)


def all_to_all(x: Float[Tensor, "N ..."], group: dist.ProcessGroup) -> Float[Tensor, "N ..."]:
    """Chunk j goes to rank j of the group; chunk i comes from rank i."""
    out: Tensor = _AllToAll.apply(x, group)
    return out


def gather_slices(x: Float[Tensor, "B T_local *rest"], group: dist.ProcessGroup) -> Float[Tensor, "B T *rest"]:
    """The ranks' slices in a row, on each. What every rank then computes is taken to be the same: the gradient of a
    rank's slice is its piece of the rank's own gradient, not a sum."""
    out: Tensor = _GatherSlices.apply(x, group)
    return out


def _sum(x: Tensor, ranks: GroupRanks) -> Tensor:
    total: Tensor = all_reduce_sum(x, ranks.group)
    return total


def _stack(x: Tensor, ranks: GroupRanks) -> Tensor:
    """[...] -> [N, ...]."""
    stacked: Tensor = all_gather_chunks(x.unsqueeze(0), ranks.group)
    return stacked


def _whole_sequence(x: Tensor, ranks: GroupRanks, length: int) -> Tensor:
    batch, here, width = x.shape
    return _stack(x, ranks).movedim(0, 1).reshape(batch, ranks.size * here, width)[:, :length]


def _summed_slice(x: Tensor, ranks: GroupRanks) -> Tensor:
    batch, length, width = x.shape
    here = ranks.largest(length)
    padded = F.pad(x, (0, 0, 0, ranks.size * here - length))
    parts = padded.view(batch, ranks.size, here, width).transpose(0, 1)  # [N, B, S, D]
    out: Tensor = reduce_scatter_sum(parts, ranks.group)
    return out.view(batch, here, width)


def _all_features(x: Tensor, ranks: GroupRanks, width: int) -> Tensor:
    padded = F.pad(x, (0, ranks.largest(width) - x.shape[-1]))
    return _stack(padded, ranks).movedim(0, -2).flatten(-2)[..., :width]


def _own_features(x: Tensor, ranks: GroupRanks) -> Tensor:
    width = x.shape[-1]
    return x.narrow(-1, ranks.first(width), ranks.here(width)).contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: GroupRanks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.ranks), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: GroupRanks) -> Tensor:
        return _sum(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: GroupRanks, length: int) -> Tensor:
        ctx.ranks = ranks
        return _whole_sequence(x, ranks, length)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _summed_slice(gradient, ctx.ranks), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: GroupRanks) -> Tensor:
        ctx.ranks, ctx.length = ranks, x.shape[1]
        return _summed_slice(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _whole_sequence(gradient, ctx.ranks, ctx.length), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: GroupRanks, width: int) -> Tensor:
        ctx.ranks = ranks
        return _all_features(x, ranks, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _own_features(gradient, ctx.ranks), None, None


class _SplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: GroupRanks) -> Tensor:
        ctx.ranks, ctx.width = ranks, x.shape[-1]
        return _own_features(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_features(gradient, ctx.ranks, ctx.width), None


class _AllToAll(torch.autograd.Function):
    """Chunk j of x goes to rank j; chunk i of the result comes from rank i. Its own inverse, hence its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all_chunks(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_to_all_chunks(gradient.contiguous(), ctx.group), None


class _GatherSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.ranks)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.ranks, dim=1)[ctx.rank], None
