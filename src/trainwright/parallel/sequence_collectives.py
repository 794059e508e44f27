"""Collectives along the sequence, with their gradients. B batch, T sequence, N ranks of the group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from trainwright.torch_private import all_to_all_chunks


class _AllToAll(torch.autograd.Function):
    """Chunk j of x goes to rank j; chunk i of the result comes from rank i. Its own inverse, hence its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all_chunks(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_to_all_chunks(gradient.contiguous(), ctx.group), None


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.ranks)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.ranks, dim=1)[ctx.rank], None


def all_to_all(x: Float[Tensor, "N ..."], group: dist.ProcessGroup) -> Float[Tensor, "N ..."]:
    """Chunk j goes to rank j of the group; chunk i comes from rank i."""
    out: Tensor = _AllToAll.apply(x, group)
    return out


def sum_of_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, on each; its gradient goes to every rank's own `x`, once."""
    out: Tensor = _SumOfRanks.apply(x, group)
    return out


def gather_sequence(x: Float[Tensor, "B T_local *rest"], group: dist.ProcessGroup) -> Float[Tensor, "B T *rest"]:
    """The ranks' slices in a row, on each. What every rank then computes is taken to be the same: the gradient of a
    rank's slice is its piece of the rank's own gradient, not a sum."""
    out: Tensor = _GatherSequence.apply(x, group)
    return out
