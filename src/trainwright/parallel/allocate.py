"""Memory for a model that was built on the meta device, after sharding: each rank allocates only its shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.mapped_file import MappedFile


class Allocate(Protocol):
    """What gives a sharded model on the meta device its tensors: memory, or shapes alone in a dry run."""

    def __call__(self, module: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None: ...


def allocate(module: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None:
    """Uninitialised memory for parameters and buffers on the meta device; what has values keeps them.

    Tied parameters and shared buffers stay so. buffer_device: the computing device, where parameters are offloaded.
    """
    _allocate(module, buffer_device or device, lambda p: torch.empty_like(p, device=device) if p.is_meta else None)


@dataclass(frozen=True)
class InFiles:
    """Parameters in files of `folder`, one each; those that have values take them along. Shards that FSDP2 pads (of rows that do
    not divide) end up in memory all the same."""

    folder: Path

    def __call__(self, module: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None:
        """As `allocate`. Raises ConfigError where the disk has not enough."""
        _allocate(module, buffer_device or device, self._in_file)

    def _in_file(self, parameter: Tensor) -> Tensor:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        there = MappedFile(self.folder, local.numel(), 1, local.dtype).rows[0].view(local.shape)
        if not local.is_meta:
            there.copy_(local)
        if not isinstance(parameter, DTensor):
            return there
        placed = parameter.device_mesh, parameter.placements
        return DTensor.from_local(there, *placed, run_check=False, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def _allocate(module: nn.Module, target: torch.device, empty: Callable[[Tensor], Tensor | None]) -> None:
    """target: where buffers go. empty: what a parameter is put into, or None for where it is."""
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    place = empty(parameter)
                    new = parameter if place is None else nn.Parameter(place, requires_grad=parameter.requires_grad)
                    parameters[id(parameter)] = new
                owner._parameters[name] = parameters[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                if id(buffer) not in buffers:
                    there = torch.empty_like(buffer, device=target) if buffer.is_meta else buffer.to(target)
                    buffers[id(buffer)] = there
                owner._buffers[name] = buffers[id(buffer)]
