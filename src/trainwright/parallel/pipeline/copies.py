"""A tied weight that lies in several pipeline parts: copies that stay one weight.

Copies on different ranks sum their gradients, in one order, and are then updated alike, to the last bit. Of two copies on
one rank (zbv has the first and the last part on one) the optimizer knows the first; the second takes its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.config.schema import ParallelConfig
from trainwright.mesh import Mesh
from trainwright.parallel.pipeline.cut import part_of
from trainwright.parallel.pipeline.order import rank_of_part


class TiedCopies:
    """Those of this rank's parts, by name; `ranks`: the pipeline ranks that hold any."""

    def __init__(self, modules: Sequence[nn.Module], mesh: Mesh, settings: ParallelConfig) -> None:
        self._mesh = mesh
        self.here: dict[str, list[nn.Parameter]] = {}
        self.ranks: dict[str, list[int]] = {}
        self._first_rank: dict[str, int] = {}
        for module in modules:
            part = part_of(module)
            assert part is not None, "a pipeline runs parts of a cut model"
            # Taken now: while FSDP keeps parameters whole, modules show other objects than the shards.
            parameters = dict(module.named_parameters())
            for name, held in part.shared.items():
                self.here.setdefault(name, [])
                self.ranks[name] = sorted({rank_of_part(index, settings) for index in held})
                self._first_rank[name] = rank_of_part(held[0], settings)
                if part.index in held:
                    self.here[name].append(parameters[name])

    def second(self) -> frozenset[str]:
        """Names whose first copy another rank holds."""
        own = self._mesh.coordinate("pipeline")
        return frozenset(name for name, copies in self.here.items() if copies and self._first_rank[name] != own)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Σ over all copies, in each one that an optimizer updates. Collective over the ranks that hold one."""
        for name, copies in self.here.items():
            if not copies or not copies[0].requires_grad:
                continue
            local = _local_gradient(copies[0])
            for other in copies[1:]:
                local += _local_gradient(other)
                other.grad = None
            local.copy_(self._sum_over(self.ranks[name], local.to(self._mesh.device).contiguous()))

    def _sum_over(self, ranks: list[int], mine: Tensor) -> Tensor:
        here, group = self._mesh.coordinate("pipeline"), self._mesh.group("pipeline")
        theirs = {rank: torch.empty_like(mine) for rank in ranks if rank != here}
        if not theirs or not mine.numel():
            return mine
        at = {rank: dist.get_global_rank(group, rank) for rank in theirs}
        operations = [dist.P2POp(dist.isend, mine, at[rank], group) for rank in theirs]
        operations += [dist.P2POp(dist.irecv, tensor, at[rank], group) for rank, tensor in theirs.items()]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        total = torch.zeros_like(mine)
        for rank in ranks:
            total += mine if rank == here else theirs[rank]
        return total

    @torch.no_grad()
    def even(self) -> None:
        """Gives second copies of this rank the values that the first ones have by now."""
        for copies in self.here.values():
            for copy in copies[1:]:
                _local(copy).copy_(_local(copies[0]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of the gradient; zeros, put in place, where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return _local(parameter.grad)
