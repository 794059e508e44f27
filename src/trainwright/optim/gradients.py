"""From summed gradients to what the optimizer takes: unscale, one global norm, one finite check, clip.

Everything works on local shards. The norm equals the unsharded one: squares are summed over the mesh axes that
shard a parameter, and over no axis that replicates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from trainwright import exchange
from trainwright.ledger import here

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def local_gradients(parameters: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, this rank's part of its gradient) for those that have one."""
    pairs = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            pairs.append((parameter, gradient.to_local() if isinstance(gradient, DTensor) else gradient))
    return pairs


def sharding_groups(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Process groups over which `parameter` is cut up (those of one rank left out)."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(parameter.placements)
        if not isinstance(placement, Replicate) and mesh.size(axis) > 1  # ZeRO on top of tensor: no subclass of Shard
    )


def global_norm(
    pairs: Sequence[tuple[nn.Parameter, Tensor]], device: torch.device, sum_over_pipeline: Callable[[Tensor], Tensor]
) -> Tensor:
    """The 2-norm over all gradients of all ranks, 0-dim on `device`; inf or nan where one is. Collective.

    pairs: each parameter of the model once over all pipeline ranks. Sums squares in fp32 (fp64 for fp64 gradients).
    """
    by_groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter, gradient in pairs:
        if gradient.numel():
            by_groups.setdefault(sharding_groups(parameter), []).append(gradient)
        else:
            by_groups.setdefault(sharding_groups(parameter), [])
    total: Tensor | None = None
    for groups, gradients in by_groups.items():
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
        norms = torch._foreach_norm(gradients, 2, dtype=dtype) if gradients else []
        square = torch.stack([n.to(device) for n in norms]).square().sum() if norms else torch.zeros((), device=device)
        square = square.to(torch.float64)  # ranks without a shard of their own must reduce in the same format
        for group in groups:
            here.collective(b"all_reduce(gradient norm)")
            exchange.all_reduce(square, group)
        total = square if total is None else total + square
    if total is None:
        total = torch.zeros((), dtype=torch.float64, device=device)
    return sum_over_pipeline(total).sqrt()


def clip_coefficient(norm: Tensor, maximum: float | None) -> Tensor | float:
    """Factor that brings a gradient of `norm` to at most `maximum`."""
    if maximum is None:
        return 1.0
    return torch.clamp(maximum / (norm + _CLIP_EPSILON), max=1.0)


def norm_of_squares(
    squares: Mapping[tuple[Any, ...], Tensor], parameters: Sequence[nn.Parameter], device: torch.device
) -> Tensor:
    """The 2-norm, 0-dim, of which this rank has `squares` by the groups of `sharding_groups`. Collective.

    parameters: those of the model, which tell all ranks the same groups in the same order.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for groups in dict.fromkeys(sharding_groups(parameter) for parameter in parameters):
        square = squares[groups].to(device) if groups in squares else torch.zeros_like(total)
        for group in groups:
            here.collective(b"all_reduce(gradient norm)")
            exchange.all_reduce(square, group)
        total = total + square
    return total.sqrt()


@torch.no_grad()
def scale_gradients(pairs: Sequence[tuple[nn.Parameter, Tensor]], factor: Tensor | float) -> None:
    """Multiplies all gradients in place."""
    gradients = [gradient for _, gradient in pairs if gradient.numel()]
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), group in by_kind.items():
        value = factor.to(device=device, dtype=dtype) if isinstance(factor, Tensor) else factor
        torch._foreach_mul_(group, value)
