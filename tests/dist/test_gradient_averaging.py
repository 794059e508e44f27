"""The worked example of gradient averaging: five ranks, gradients all-1 ... all-5, one SGD step on every rank alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trainwright as tw
from ranks import run_ranks

RANKS = 5
START = [1.0, 2.0, 3.0, 4.0, 5.0]
# Their mean is (1 + 2 + 3 + 4 + 5) / 5 = 3; at a learning rate of 0.1 each weight falls by 0.3. The article that the
# example is from prints another result: an arithmetic slip.
AFTER_ONE_STEP = [0.7, 1.7, 2.7, 3.7, 4.7]


class Slope(nn.Module):
    """Five weights whose gradient is `slope` in every entry."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(START))

    def forward(self, slope: Tensor) -> Tensor:
        return slope * self.weight.sum()


def _steps(rank: int, config: dict[str, object], slopes: list[list[float]]) -> tuple[list[float], float]:
    """One step with this rank's gradients, a micro-batch each; (weights [5] after it, gradient norm)."""
    settings = {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}, "precision": "fp32"}
    engine = tw.initialize(model=Slope(), config=settings | config)
    for slope in slopes[rank]:
        engine(torch.tensor(slope)).backward()
        engine.step()
    assert engine.global_step == 1
    parameter = next(engine.module.parameters())
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    found = whole.detach().tolist(), engine.grad_norm
    engine.close()
    return found


def _all_cases(rank: int) -> dict[str, tuple[list[float], float]]:
    one_to_five = [[float(r + 1)] for r in range(RANKS)]
    cases = {f"stage {stage}": ({"zero": stage}, one_to_five) for stage in range(4)}
    # Whoever has which gradient, and in how many micro-batches: each rank and each micro-batch counts alike.
    cases["turned round"] = ({"zero": 2}, one_to_five[::-1])
    halves = [[0.0, 2.0 * (r + 1)] for r in range(RANKS)]
    for stage in (1, 2, 3):
        cases[f"accumulated, stage {stage}"] = ({"zero": stage, "batch": {"accumulation": 2}}, halves)
    cases["fp16, static scale"] = ({"zero": 1, "precision": {"dtype": "fp16", "loss_scale": 1024}}, one_to_five)
    return {name: _steps(rank, *case) for name, case in cases.items()}


def test_every_rank_contributes_equally() -> None:
    found = run_ranks(_all_cases, RANKS)
    for name, (weights, norm) in found[0].items():
        assert weights == pytest.approx(AFTER_ONE_STEP, rel=1e-6), name
        assert norm == pytest.approx(3.0 * 5**0.5, rel=1e-6), name
    for rank in range(1, RANKS):
        assert found[rank] == found[0], f"rank {rank} holds other weights than rank 0"
