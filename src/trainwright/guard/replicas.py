"""Are copies of a parameter still equal, bit by bit? A rank whose hardware computes wrongly is told from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from trainwright import distributed
from trainwright.errors import NumericsError
from trainwright.ledger import here
from trainwright.mesh import Mesh
from trainwright.position import of_ranks

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(parameters: Sequence[tuple[str, nn.Parameter]], mesh: Mesh, step: int) -> None:
    """Compares this rank's part of every parameter with its copies on other ranks. Collective.

    Raises NumericsError, on all ranks, naming the first parameter that differs and the ranks that are in the minority.
    """
    degrees = mesh.degrees
    copies = mesh.parameters.size(0) if mesh.parameters.ndim > 1 else 1
    if not distributed.several() or (copies == 1 and degrees.tensor == 1):  # the same on all ranks
        return
    groups: dict[Any, list[int]] = {}
    for number, (_, parameter) in enumerate(parameters):
        for group in _groups_of_copies(parameter):
            groups.setdefault(group, []).append(number)
    sums = [fingerprint(_local(p)) for _, p in parameters]
    found: tuple[str, dict[int, int]] | None = None
    for group, numbers in groups.items():
        mine = torch.stack([sums[number] for number in numbers])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        here.collective(b"comparison of replicas")
        dist.all_gather(everyone, mine, group=group)
        table = torch.stack(everyone)
        differs = (table != table[0]).any(dim=0).cpu()  # one wait for the device
        if found is None and bool(differs.any()):
            column = int(differs.nonzero()[0])
            values = table[:, column].tolist()
            found = parameters[numbers[column]][0], {dist.get_global_rank(group, i): v for i, v in enumerate(values)}
    _raise_on_all(found, step)


def _raise_on_all(mine: tuple[str, dict[int, int]] | None, step: int) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    here.collective(b"agreement on replicas")
    dist.all_gather_object(everyone, mine)
    found = next((found for found in everyone if found is not None), None)
    if found is None:
        return
    name, values = found
    usual, times = Counter(values.values()).most_common(1)[0]
    odd = [rank for rank, value in values.items() if value != usual]
    alone = times > len(values) / 2
    who = of_ranks(odd) if alone else f"{of_ranks(list(values))} (no majority)"
    raise NumericsError(
        f"after step {step} the copies of {name} differ: {who} hold{'s' if alone and len(odd) == 1 else ''} other values",
        "replicas are updated with one gradient and stay equal, bit by bit",
        "a machine that computes wrongly is taken out; go on from a checkpoint of before, trainwright verify for software",
    )


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum of the bits of all elements, each as an integer; int64, 0-dim. A flipped bit changes it."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _groups_of_copies(parameter: nn.Parameter) -> list[Any]:
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    return [
        mesh.get_group(axis)
        for axis, placement in enumerate(parameter.placements)
        if isinstance(placement, Replicate) and mesh.size(axis) > 1
    ]
