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

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ContradictionError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


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
    degrees: Degrees

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the data path: replicate x shard."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the global batch this rank reads."""
        replicate = self.device_mesh.get_local_rank("replicate")
        return int(replicate * self.degrees.shard + self.device_mesh.get_local_rank("shard"))

    @property
    def parameters(self) -> DeviceMesh:
        """The mesh for `fully_shard`: (shard,) alone, or (replicate, shard) where copies exist or nothing is sharded."""
        if self.degrees.replicate == 1 and self.degrees.shard > 1:
            return self.device_mesh["shard"]
        return self.device_mesh["replicate", "shard"]

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        kind = self.device_mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed in place over the data-parallel ranks. Collective."""
        for axis in ("replicate", "shard"):
            if getattr(self.degrees, axis) > 1:
                dist.all_reduce(values, group=self.device_mesh.get_group(axis))
        return values


def build_mesh(parallel: ParallelConfig, stage: int, device: torch.device) -> Mesh:
    """The mesh over all ranks of the default process group. Collective."""
    degrees = resolve_degrees(parallel, stage, dist.get_world_size())
    shape = tuple(getattr(degrees, axis) for axis in AXES)
    return Mesh(init_device_mesh(device.type, shape, mesh_dim_names=AXES), degrees)
