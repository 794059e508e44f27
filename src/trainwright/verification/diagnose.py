"""Where a wrong gradient comes from: whose samples are missing in it, or weigh too much.

The right gradient is a sum over the ranks' micro-batches, g = Σ g_k. What a fault leaves is nearly always
Σ w_k g_k with other weights: 0 where a reduction was dropped, 0.5 where a loss was scaled. The weights are the least
squares' solution on the rows that one rank holds; where what is left over is small, they are the finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.config import Config
from trainwright.data.batch import Batch
from trainwright.verification.collect import Box
from trainwright.verification.data import rows_of
from trainwright.verification.reference import Reference, token_loss_sum

_EXPLAINED = 1e-3
"""Share of the error that may be left over."""
_OFF = 1e-3
"""A weight this far from 1 is a finding."""


@dataclass(frozen=True)
class Portion:
    """A part of the global batch: the rows of one replica's micro-batch."""

    ranks: tuple[int, ...]
    """Those of the replica."""
    micro_batch: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"rank {', '.join(map(str, self.ranks))}'s micro-batch {self.micro_batch + 1}"


def portions_of(
    row_ranges: Sequence[tuple[int, int]], ranks: Sequence[tuple[int, ...]], micro_size: int
) -> list[Portion]:
    """The replicas' micro-batches that hold a row at least; `ranks` are those of each replica."""
    found = []
    for (start, stop), members in zip(row_ranges, ranks, strict=True):
        for index, first in enumerate(range(start, stop, micro_size)):
            found.append(Portion(members, index, first, min(first + micro_size, stop)))
    return found


def portion_gradients(
    reference: Reference, batch: Batch, step: int, name: str, portions: Sequence[Portion], config: Config
) -> list[Tensor]:
    """The gradient of parameter `name` that each portion adds to the global mean's, on the CPU."""
    module = reference.at(step)
    parameter = dict(module.named_parameters())[name]
    valid = max(1, int(batch.valid_tokens()))
    found = []
    for portion in portions:
        part = rows_of(batch, portion.start, portion.stop, portion.stop - portion.start)
        loss = token_loss_sum(module, part, config, step) / valid
        (gradient,) = torch.autograd.grad(loss, parameter, allow_unused=True)
        found.append(torch.zeros_like(parameter).cpu() if gradient is None else gradient.detach().cpu())
    return found


def weights_in(found: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, float]:
    """(least-squares weight of each part in `found`, ‖what is left over‖ / ‖found - Σ parts‖)."""
    columns = torch.stack([part.double().flatten() for part in parts], dim=1)
    target = found.double().flatten()
    error = (target - columns.sum(dim=1)).norm()
    weights = torch.linalg.lstsq(columns, target.unsqueeze(1), driver="gelsd").solution.flatten()
    left = (target - columns @ weights).norm()
    return weights, float(left / error.clamp(min=1e-300))


@dataclass(frozen=True)
class Explanation:
    """What a wrong gradient is made of."""

    sentences: list[str]
    ranks: frozenset[int]
    """Those whose micro-batches count more or less than once."""


def explain(found: Tensor, parts: Sequence[Tensor], portions: Sequence[Portion], boxes: dict[int, Box]) -> Explanation:
    """Looks at the rows of each rank by themselves: a reduction that fails leaves each with something else."""
    live = [i for i, part in enumerate(parts) if bool(part.any())]
    by_text: dict[str, list[int]] = {}
    blamed: set[int] = set()
    for box, ranks in _by_box(boxes).items():
        index = tuple(slice(start, stop) for start, stop in box)
        piece, pieces = found[index], [parts[i][index] for i in live]
        if not live or piece.numel() < len(live):
            continue
        if (piece - torch.stack(pieces).sum(dim=0)).norm() <= 1e-6 * found.norm():
            continue
        weights, left = weights_in(piece, pieces)
        off = [(portions[i], w) for i, w in zip(live, weights.tolist(), strict=True) if abs(w - 1) > _OFF]
        if left > _EXPLAINED or not off:
            text = "no mixture of the micro-batches' gradients gives what is there"
        else:
            text = "; ".join(f"{portion} counts {_number(w)} times" for portion, w in off)
            blamed |= {rank for portion, _ in off for rank in portion.ranks}
        by_text.setdefault(text, []).extend(ranks)
    sentences = []
    for text, ranks in by_text.items():
        everywhere = len(by_text) == 1 and set(ranks) == set(boxes)
        holder = "in all rows" if everywhere else f"in the rows of rank {', '.join(map(str, sorted(ranks)))}"
        sentences.append(f"{holder} {text}")
    return Explanation(sentences, frozenset(blamed))


def _by_box(boxes: dict[int, Box]) -> dict[Box, list[int]]:
    """Ranks by what they hold."""
    found: dict[Box, list[int]] = {}
    for rank, box in boxes.items():
        found.setdefault(box, []).append(rank)
    return found


def _number(weight: float) -> str:
    return "0" if abs(weight) < _OFF else f"{weight:.3g}"
