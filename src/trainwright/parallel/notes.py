"""Notes in the ledger: which unit forward or backward has come to, and FSDP's collectives by the unit they are for."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainwright import exchange
from trainwright.ledger import here
from trainwright.mesh import Mesh
from trainwright.parallel.overlap import Overlap


def note_units(units: Sequence[tuple[str, nn.Module]]) -> None:
    """Hooks that note a unit where its forward begins (before FSDP gathers it) and where its backward does."""
    for name, module in units:
        module.register_forward_pre_hook(functools.partial(_forward_begins, name.encode()), prepend=True)
        module.register_forward_hook(functools.partial(_forward_ends, name.encode()), prepend=True)


def _forward_begins(name: bytes, _module: nn.Module, _inputs: Any) -> None:
    here.module(name)


def _forward_ends(name: bytes, _module: nn.Module, _inputs: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.requires_grad:
        first.register_hook(functools.partial(_backward_begins, name))


def _backward_begins(name: bytes, _gradient: Tensor) -> None:
    here.module(name)


def note_collectives(
    sharded: Sequence[FSDPModule], model: nn.Module, mesh: Mesh, overlap: Overlap, exact: Collection[nn.Module]
) -> None:
    """Has FSDP call its collectives through us: their names are noted, reductions overlap. Nothing is called for one shard.

    exact: units that compute in the reduction's format.
    """
    if mesh.parameters.size(-1) == 1:
        return
    names = {id(module): name for name, module in model.named_modules()}
    wide = {id(module) for module in exact}
    for module in sharded:
        name = names[id(module)] or "root"
        module.set_custom_all_gather(_AllGather(name))  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(_ReduceScatter(name, overlap, exact=id(module) in wide))  # type: ignore[arg-type]


class _Named:
    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the collective's input or output."""
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Named):
    """FSDP's all-gather of one unit's parameters."""

    def __init__(self, name: str) -> None:
        super().__init__(f"all_gather({name})")

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        here.collective(self._name)
        return exchange.all_gather(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(_Named):
    """FSDP's reduce-scatter of one unit's gradients."""

    def __init__(self, name: str, overlap: Overlap, exact: bool) -> None:
        super().__init__(f"reduce_scatter({name})")
        self._unit, self._overlap, self._exact = name, overlap, exact

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As above, in the format that is sent."""
        return super().allocate(
            size, dtype=dtype if self._exact else self._overlap.memory_format(self._unit, dtype), device=device
        )

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any) -> Any:
        self._overlap.settle()
        here.collective(self._name)
        return self._overlap.reduce_scatter(self._unit, output_tensor, input_tensor, group, op)
