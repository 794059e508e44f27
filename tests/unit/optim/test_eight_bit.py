"""Moments in 8 bits: what a block keeps exactly, how far off the rest is, that rounding is right on average."""

from __future__ import annotations

import pytest
import torch

from trainwright.optim.blocks import BLOCK, takes
from trainwright.optim.compact_adamw import CompactAdamW
from trainwright.optim.eight_bit import EightBit

WIDE = torch.float32


def _kept(value: torch.Tensor, squares: bool, seed: int = 0) -> EightBit:
    made = EightBit(torch.zeros(value.numel(), dtype=torch.uint8), torch.zeros(value.numel() // BLOCK), squares)
    made.keep(value, torch.Generator().manual_seed(seed))
    return made


def _values(blocks: int = 500) -> torch.Tensor:
    """Each block over some six decades."""
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** (-6 * torch.rand(blocks * BLOCK, generator=generator))
    return sizes * torch.randn(blocks * BLOCK, generator=generator)


def test_zero_the_largest_and_signs_are_exact():
    value = torch.zeros(2 * BLOCK)
    value[3], value[5], value[BLOCK + 1] = 1.7, -1.7, -3e-30
    assert torch.equal(_kept(value, squares=False).read(WIDE), value)
    assert torch.equal(_kept(torch.zeros(BLOCK), squares=False).read(WIDE), torch.zeros(BLOCK))
    assert torch.equal(_kept(torch.zeros(BLOCK), squares=True).read(WIDE), torch.zeros(BLOCK))
    squares = torch.full((BLOCK,), 2.25)
    assert torch.equal(_kept(squares, squares=True).read(WIDE), squares)


@pytest.mark.parametrize("squares", [False, True])
def test_a_value_is_off_by_less_than_a_step_and_right_on_average(squares):
    value = _values().square() if squares else _values()
    largest = value.abs().view(-1, BLOCK).amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)
    times = 300
    found = torch.stack([_kept(value, squares, seed).read(WIDE) for seed in range(times)])
    of, found_of, most = (value.sqrt(), found.sqrt(), largest.sqrt()) if squares else (value, found, largest)
    step = (of.abs() + 2**-15 * most) / (16 if squares else 8)
    assert ((found_of - of).abs() <= 1.01 * step).all()
    # the mean of so many is within five of its standard deviations, each at most half a step
    mean = found_of.double().mean(0)
    if squares:  # the lowest code is never 0
        enough = of > 2**-14 * most
        mean, of, step = mean[enough], of[enough], step[enough]
    assert ((mean - of).abs() <= 5 * 0.5 * step / times**0.5 + 1e-6 * of.abs()).all()


@pytest.mark.parametrize("squares", [False, True])
def test_what_was_kept_is_kept_again_as_it_is(squares):
    value = _values().square() if squares else _values()
    once = _kept(value, squares)
    again = _kept(once.read(WIDE), squares, seed=7)
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.scales, again.scales)


def test_a_root_is_never_zero_beside_others():
    value = torch.full((BLOCK,), 1e-30)
    value[0] = 1.0
    assert (_kept(value, squares=True).read(WIDE) > 0).all()


def test_non_finite_values_stay_so():
    value = torch.ones(BLOCK)
    value[1] = float("nan")
    assert not _kept(value, squares=False).read(WIDE).isfinite().all()
    value[1] = float("inf")
    assert not _kept(value, squares=True).read(WIDE).isfinite().all()


def test_matrices_of_whole_blocks_alone():
    assert takes(torch.Size((64, 64)))
    assert takes(torch.Size((4, 16, 64)))
    assert not takes(torch.Size((4096,)))
    assert not takes(torch.Size((64, 96)))
    assert not takes(torch.Size((63, 64)))


def test_it_trains_as_fp32_does_and_keeps_two_bytes_a_value():
    """A least-squares problem, noise in the gradients; weights of the two runs end as near to the solution."""
    generator = torch.Generator().manual_seed(0)
    solution = torch.randn(64, 128, generator=generator)
    inputs = torch.randn(512, 64, generator=generator)

    def distance(make):
        weight = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = make([weight])
        for step in range(300):
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * (1 - step / 300)
            rows = torch.randint(0, 512, (32,), generator=torch.Generator().manual_seed(step))
            weight.grad = inputs[rows].T @ (inputs[rows] @ (weight.detach() - solution)) / 32
            optimizer.step()
        return (weight - solution).norm().item() / solution.norm().item(), optimizer.state[weight]

    words = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    plain, _ = distance(lambda p: torch.optim.AdamW(p, **words))
    narrow, state = distance(lambda p: CompactAdamW(p, moments=torch.uint8, **words))
    assert plain < 0.1
    assert narrow < 1.3 * plain
    held = sum(t.nbytes for name, t in state.items() if name != "step")
    assert held == 64 * 128 * 2 + 2 * 4 * 64 * 128 // BLOCK
