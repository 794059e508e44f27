"""Evaluation on sharded models: one mean over all valid tokens of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.mesh import Mesh
from trainwright.micro_batches import cut
from trainwright.parallel.parallel_model import ParallelModel


@dataclass(frozen=True)
class Evaluation:
    """Mean token loss in nats, and how many tokens it is the mean of."""

    loss: float
    tokens: int

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """The loss in bits, over the bytes of text that a token stands for."""
        return self.loss / math.log(2) * tokens_per_byte

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(model: ParallelModel, batches: Iterable[Any], mesh: Mesh) -> Evaluation:
    """Runs `batches` (each rank its own share, equally many) in eval mode. Collective."""
    was_training = model.module.training
    model.module.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    try:
        for batch in batches:
            part = model.loss(cut(batch, 1, mesh.device)[0])
            totals += torch.stack([part.sum.to(torch.float64), part.count.to(torch.float64)])
    finally:
        model.module.train(was_training)
    loss_sum, tokens = mesh.sum_over_data(totals).tolist()
    return Evaluation(loss_sum / tokens if tokens else math.nan, int(tokens))
