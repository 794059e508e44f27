"""Ranks as one named DeviceMesh, passed explicitly, never global.

Five axes, outermost first: pipeline, replicate, shard, context, tensor. A degree of 1 is an axis of size 1: the same
code runs, with nothing to communicate. ZeRO stage 0 is (replicate N, shard 1); stages 1-3 shard over what the other
degrees leave; `replicate` > 1 is hybrid sharding (HSDP).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainwright import distributed, exchange
from trainwright.config.schema import ParallelConfig
from trainwright.errors import ContradictionError
from trainwright.ledger import here

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
_SUM_OVER = {axis: f"all_reduce(sums over {axis})".encode() for axis in AXES}


@dataclass(frozen=True)
class Degrees:
    """Sizes of the five axes; their product is the world size, N."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int


def resolve_degrees(parallel: ParallelConfig, stage: int, world_size: int) -> Degrees:
    """Degrees for `world_size` ranks. Raises ContradictionError where they do not divide it."""
    model_ranks = parallel.pipeline * parallel.context * parallel.tensor
    if world_size % model_ranks:
        raise ContradictionError(
            f"pipeline {parallel.pipeline} x context {parallel.context} x tensor {parallel.tensor} = {model_ranks} "
            f"on {world_size} ranks",
            "their product divides the number of ranks",
            f"start {model_ranks * max(1, world_size // model_ranks)} ranks",
        )
    data_ranks = world_size // model_ranks
    if stage == 0:
        if parallel.replicate not in (1, data_ranks):
            raise ContradictionError(
                f"parallel.replicate={parallel.replicate} at ZeRO stage 0 on {data_ranks} data-parallel ranks",
                "stage 0 replicates over all of them",
                "leave parallel.replicate out, or take zero.stage=1 or higher for hybrid sharding",
            )
        return Degrees(parallel.pipeline, data_ranks, 1, parallel.context, parallel.tensor)
    if data_ranks % parallel.replicate:
        fits = [n for n in range(1, data_ranks + 1) if data_ranks % n == 0]
        raise ContradictionError(
            f"parallel.replicate={parallel.replicate} on {data_ranks} data-parallel ranks",
            "the number of copies divides the number of ranks",
            f"parallel.replicate={min(fits, key=lambda n: abs(n - parallel.replicate))} (one of {fits})",
        )
    return Degrees(
        parallel.pipeline, parallel.replicate, data_ranks // parallel.replicate, parallel.context, parallel.tensor
    )


@dataclass(frozen=True)
class Mesh:
    """The ranks' arrangement and this rank's place in it."""

    device_mesh: DeviceMesh
    """All five axes."""
    parameter_mesh: DeviceMesh
    """The same ranks as (pipeline, replicate, shard, tensor). Context ranks see different tokens, so for parameters and
    gradients they are data ranks: folded into `shard`, at stage 0 into `replicate`."""
    degrees: Degrees

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the data path: replicate x shard."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the global batch this rank reads."""
        return self.coordinate("replicate") * self.degrees.shard + self.coordinate("shard")

    def coordinate(self, axis: str) -> int:
        """This rank's place on one of the five axes."""
        return int(self.device_mesh.get_local_rank(axis))

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on one axis alone."""
        return self.device_mesh.get_group(axis)

    @property
    def parameters(self) -> DeviceMesh:
        """The mesh for `fully_shard`: (shard,) alone, or (replicate, shard) where copies exist."""
        mesh = self.parameter_mesh
        names = mesh.mesh_dim_names or ()
        if mesh.size(names.index("replicate")) == 1:
            return mesh["shard"]
        return mesh["replicate", "shard"]

    @property
    def tensor(self) -> DeviceMesh:
        """The mesh of tensor-parallel placements, 1-D, of one root with `parameters`."""
        return self.parameter_mesh["tensor"]

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        kind = self.device_mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed in place over the data-parallel ranks. Collective."""
        return self._sum(values, ("replicate", "shard"))

    def sum_over_replica(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed in place over the ranks that share a replica's micro-batch: those that hold other tokens of it
        (context) or other layers (pipeline). Collective."""
        return self._sum(values, ("pipeline", "context"))

    def sum_over_pipeline(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed in place over the ranks that hold other layers. Collective."""
        return self._sum(values, ("pipeline",))

    def _sum(self, values: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
        for axis in axes:
            if getattr(self.degrees, axis) > 1:
                here.collective(_SUM_OVER[axis])
                exchange.all_reduce(values, self.group(axis))
        return values


def build_mesh(parallel: ParallelConfig, stage: int, device: torch.device) -> Mesh:
    """The mesh over all ranks of the default process group. Collective."""
    degrees = resolve_degrees(parallel, stage, dist.get_world_size())
    shape = tuple(getattr(degrees, axis) for axis in AXES)
    device_mesh = _device_mesh(device.type, shape, AXES)
    if degrees.context == 1:
        return Mesh(device_mesh, device_mesh, degrees)
    folded = (degrees.replicate, degrees.shard * degrees.context)
    if stage == 0:
        folded = (degrees.replicate * degrees.context, 1)
    parameter_shape = (degrees.pipeline, *folded, degrees.tensor)
    names = ("pipeline", "replicate", "shard", "tensor")
    return Mesh(device_mesh, _device_mesh(device.type, parameter_shape, names), degrees)


def _device_mesh(kind: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return distributed.kept((kind, shape, names), lambda: init_device_mesh(kind, shape, mesh_dim_names=names))
