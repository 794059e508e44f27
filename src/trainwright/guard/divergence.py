"""Did all ranks call the same collectives in this step? Two more numbers in the sum that a step makes anyway.

Collectives are matched by their order alone: ranks whose models run other modules can exchange the wrong tensors without
any error, or wait for ever. The sums of a fingerprint and of its square tell whether all were equal (their variance
is zero), exactly: fingerprints are below 2^20, so that both sums stay below 2^53 for up to 8,192 ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright import distributed
from trainwright.errors import UsageError
from trainwright.guard.verdict import first_difference
from trainwright.ledger import here
from trainwright.mesh import Mesh


def fingerprints(device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's fingerprint and its square, 0-dim float64: to be summed over the data-parallel ranks."""
    value = float(here.take_fingerprint())
    # Filled, not copied: a copy from the host would wait for the whole backward.
    return tuple(torch.full((), x, dtype=torch.float64, device=device) for x in (value, value * value))  # type: ignore[return-value]


def check_same_collectives(total: float, total_of_squares: float, mesh: Mesh, step: int) -> None:
    """Raises UsageError, on all of these ranks, where they did not call the same collectives. step: the one under way."""
    ranks = mesh.data_parallel_size
    if ranks > 8192 or not distributed.several() or ranks * int(total_of_squares) == int(total) ** 2:
        return
    positions: list[Any] = [None] * dist.get_world_size()
    mine = here.position()
    degrees = mesh.degrees
    told = ""
    if degrees.pipeline == degrees.context == degrees.tensor == 1:
        dist.all_gather_object(positions, mine)
        told = ": " + first_difference(positions)
    raise UsageError(
        f"the ranks called different collectives in step {step}{told}",
        "collectives are matched by their order: every rank runs the same modules, in the same order, equally often",
        "no branch on the rank or on the data around a module; trainwright verify CONFIG",
    )
