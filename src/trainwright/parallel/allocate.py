"""Memory for a model that was built on the meta device, after sharding: each rank allocates only its shards."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Allocate(Protocol):
    """What gives a sharded model on the meta device its tensors: memory, or shapes alone in a dry run."""

    def __call__(self, module: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None: ...


@torch.no_grad()
def allocate(module: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None:
    """Uninitialised memory for parameters and buffers on the meta device; what has values keeps them.

    Tied parameters and shared buffers stay so. buffer_device: the computing device, where parameters are offloaded.
    """
    target = buffer_device or device
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in parameters:
                    empty = torch.empty_like(parameter, device=device)
                    parameters[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                owner._parameters[name] = parameters[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                if id(buffer) not in buffers:
                    empty = torch.empty_like(buffer, device=target) if buffer.is_meta else buffer.to(target)
                    buffers[id(buffer)] = empty
                owner._buffers[name] = buffers[id(buffer)]
