"""The finished parts of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trainwright.config import Resolved
from trainwright.mesh import Mesh
from trainwright.parallel.captured import CapturedStep
from trainwright.parallel.parallel_model import ParallelModel
from trainwright.randomness import Randomness
from trainwright.update import Update


@dataclass(frozen=True)
class Parts:
    """The finished parts that `startup.build_engine` puts together."""

    model: ParallelModel
    mesh: Mesh
    update: Update
    config: Resolved
    accumulation: int
    randomness: Randomness
    count_tokens: Callable[[Tensor], Tensor]
    """How many labels [B, T] the model's loss is the mean of, 0-dim on their device."""
    captured: CapturedStep | None = None
    """Runs the forwards and backwards of whole steps, where they are replayed."""
