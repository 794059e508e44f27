"""The fused loss over a vocabulary that several ranks share: the ranks are played one after another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.fused import cross_entropy, token_losses
from trainwright.fused.cross_entropy import linear_cross_entropy
from trainwright.fused.token_losses import PLAIN, LossTerms, VocabularySlice


def _first_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, rows: slice, terms: LossTerms) -> Tensor:
    """[T, 2 or 3]: what the rank with `rows` tells the others of each token."""
    logits = hidden @ weight[rows].t()
    whole = hidden @ weight.t()
    held = (labels >= rows.start) & (labels < rows.stop)
    target = whole.gather(1, labels.clamp(min=0)[:, None])[:, 0] * held
    told = (logits.logsumexp(1), target, logits.sum(1))
    return torch.stack(told if terms.label_smoothing else told[:2], dim=1)


@pytest.mark.parametrize(
    ("vocab_size", "cuts", "chunk"), [(11, (0, 6, 11), 1 << 20), (11, (0, 6, 11), 20), (3, (0, 1, 2, 3, 3), 2)]
)
@pytest.mark.parametrize("terms", [PLAIN, LossTerms(label_smoothing=0.2, z_loss=0.1)], ids=["plain", "terms"])
def test_slices_add_up_to_the_whole(
    vocab_size: int, cuts: tuple[int, ...], chunk: int, terms: LossTerms, monkeypatch: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab_size, (9,), generator=generator)
    labels[2] = labels[7] = -100
    first, second = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected, count = linear_cross_entropy(first, second, labels, terms=terms)
    expected.backward(torch.tensor(3.0, dtype=torch.float64))

    slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    told = torch.stack([_first_chunks(hidden, weight, labels, rows, terms) for rows in slices])
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * chunk)
    largest = max(rows.stop - rows.start for rows in slices)
    hidden_gradient = torch.zeros_like(hidden)
    for number, rows in enumerate(slices):
        seen: list[int] = [0]

        def gather(mine: Tensor, group: Any, number: int = number, seen: list[int] = seen) -> Tensor:
            tokens = slice(seen[0], seen[0] + mine.shape[1])
            seen[0] = tokens.stop
            valid = (labels[tokens] != -100)[:, None]  # of the others nothing is used
            torch.testing.assert_close(mine[0].where(valid, 0), told[number, tokens].where(valid, 0))
            return told[:, tokens]

        monkeypatch.setattr(token_losses, "all_gather_chunks", gather)
        part = hidden.clone().requires_grad_()
        mine = weight[rows].clone().requires_grad_()
        place = VocabularySlice(rows.start, largest, vocab_size, None)  # type: ignore[arg-type]
        loss, tokens = linear_cross_entropy(part, mine, labels, place, terms)
        loss.backward(torch.tensor(3.0, dtype=torch.float64))
        assert (loss.item(), tokens.item()) == (pytest.approx(expected.item(), rel=1e-12), count.item())
        assert seen[0] == len(labels)
        torch.testing.assert_close(mine.grad, second.grad[rows])  # type: ignore[index]
        hidden_gradient += part.grad  # type: ignore[operator]
    torch.testing.assert_close(hidden_gradient, first.grad)
