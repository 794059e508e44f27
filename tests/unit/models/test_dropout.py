"""Dropout as a pure function of (seed, step, sample, layer, position, channel)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trainwright.models.dropout import dropout, dropout_context, sample_keys

CPU = torch.device("cpu")


def mask(seed=0, step=0, ids=(0, 1, 2), layer=0, rate=0.3, length=7, width=9, first=0):
    with dropout_context(seed, step, torch.tensor(ids)):
        keys = sample_keys(len(ids), CPU)
    return dropout(torch.ones(len(ids), length, width), rate, keys, layer, first) != 0


def test_the_same_place_gives_the_same_mask_in_any_batch():
    whole = mask(ids=(10, 11, 12, 13))
    assert torch.equal(whole[1:3], mask(ids=(11, 12)))
    assert torch.equal(whole[3:], mask(ids=(13,)))


def test_a_mask_does_not_depend_on_the_length_nor_on_the_cut():
    whole = mask(length=12)
    assert torch.equal(whole[:, :7], mask(length=7))
    assert torch.equal(whole[:, 5:], mask(length=7, first=5))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"ids": (5, 6, 7)}, {"layer": 1}])
def test_every_part_of_the_key_counts(change):
    differing = (mask(length=64, width=64) != mask(length=64, width=64, **change)).float().mean().item()
    assert differing == pytest.approx(2 * 0.3 * 0.7, abs=0.02)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_scale_and_independence_of_neighbours(rate):
    kept = mask(rate=rate, length=256, width=256, ids=tuple(range(4))).float()
    assert kept.mean().item() == pytest.approx(1 - rate, abs=0.005)
    for axis in (0, 1, 2):
        centred = kept - kept.mean()
        correlation = (centred * centred.roll(1, axis)).mean() / centred.square().mean()
        assert abs(correlation.item()) < 0.01
    x = torch.ones(1, 64, 64)
    keys = torch.zeros(1, dtype=torch.int64)
    assert dropout(x, rate, keys, 0).max().item() == pytest.approx(1 / (1 - rate))


def test_recomputation_outside_of_the_context_draws_the_same_mask():
    x = torch.ones(2, 8, 8, requires_grad=True)
    with dropout_context(3, 5):
        keys = sample_keys(2, CPU)
        out = checkpoint(lambda x: dropout(x, 0.5, keys, 0).square(), x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach() * 2)


def test_without_a_context_torchs_generator_decides():
    torch.manual_seed(0)
    first = sample_keys(4, CPU)
    assert not torch.equal(first, sample_keys(4, CPU))
    torch.manual_seed(0)
    assert torch.equal(first, sample_keys(4, CPU))


def test_without_sample_ids_the_rows_are_counted():
    with dropout_context(1, 2):
        rows = sample_keys(3, CPU)
    with dropout_context(1, 2, torch.arange(3)):
        assert torch.equal(rows, sample_keys(3, CPU))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the compiler
def test_compiled_the_masks_are_the_same():
    """Its 64-bit arithmetic wraps; layers of one graph are told apart by a number that it is given."""
    torch._dynamo.reset()
    x, keys = torch.ones(2, 9, 7), torch.tensor([3, -(1 << 62)])
    compiled = torch.compile(dropout)
    for layer, first in ((0, 0), (1, 0), (7, 1000)):
        assert torch.equal(compiled(x, 0.3, keys, layer, first), dropout(x, 0.3, keys, layer, first))
