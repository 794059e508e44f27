"""The outer step's pure functions against closed forms and torch's own SGD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.optim.outer import (
    BLOCK,
    Format,
    decode,
    encode,
    encode_with_feedback,
    late_weights,
    nesterov_,
    payload_bytes,
)

FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")


def _values(seed: int, blocks: int = 3, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(blocks * BLOCK, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_payload_has_the_bytes_that_are_said_and_stands_for_its_values(dtype: Format) -> None:
    values = _values(0)
    payload = encode(values.clone(), dtype)
    assert payload.dtype == torch.uint8
    assert payload.numel() == payload_bytes(values.numel(), dtype)
    found = decode(payload, values.numel(), dtype)
    blocks, error = values.view(-1, BLOCK), (found - values).view(-1, BLOCK).abs()
    bounds = {
        "fp32": torch.zeros_like(blocks),
        "bf16": blocks.abs() * 2**-8,
        "int8": blocks.abs().amax(dim=1, keepdim=True).expand_as(blocks) / 254,
        "int4": blocks.abs().amax(dim=1, keepdim=True).expand_as(blocks) / 14,
    }
    assert torch.all(error <= bounds[dtype] * (1 + 1e-5))


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127.0), ("int4", 7.0)])
def test_integers_leave_zero_blocks_and_block_maxima_as_they_are(dtype: Format, largest: float) -> None:
    values = torch.zeros(3 * BLOCK)
    values[BLOCK:] = 0.3
    values[BLOCK] = -largest
    values[2 * BLOCK :] = torch.arange(BLOCK) % (2 * largest + 1) - largest  # every number there is
    found = decode(encode(values.clone(), dtype), values.numel(), dtype)
    assert torch.equal(found[:BLOCK], torch.zeros(BLOCK))
    assert found[BLOCK] == -largest
    assert found[BLOCK + 1] == 0.0  # 0.3 of a step of 1
    assert torch.equal(found[2 * BLOCK :], values[2 * BLOCK :])


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e4]), dtype=st.sampled_from(FORMATS[1:]))
@settings(max_examples=25, deadline=None)
def test_rounding_contracts(seed: int, scale: float, dtype: Format) -> None:
    """‖x − Q(x)‖ <= q ‖x‖ with q < 1: what error feedback converges under (arXiv 1901.09847)."""
    values = _values(seed, scale=scale)
    lost = values - decode(encode(values.clone(), dtype), values.numel(), dtype)
    assert lost.norm() <= (0.2 if dtype == "int4" else 0.02) * values.norm()


@pytest.mark.parametrize("dtype", FORMATS[1:])
def test_with_error_feedback_nothing_is_lost_for_good(dtype: Format) -> None:
    """Σ decoded = Σ gradients − the last residual: the mean of what arrives goes to the mean of what was sent as 1/rounds,
    also of values far below a step of the format."""
    rounds = 64
    gradient = _values(1) * (2e-2 if dtype == "int4" else 1e-3)
    gradient[::BLOCK] = 1.0  # a block's maximum: most others are below half a step of the integers
    residual = torch.zeros_like(gradient)
    arrived, without = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for _ in range(rounds):
        arrived += decode(encode_with_feedback(gradient, residual, dtype), gradient.numel(), dtype)
        without += decode(encode(gradient.clone(), dtype), gradient.numel(), dtype)
    torch.testing.assert_close(arrived + residual, rounds * gradient, rtol=1e-5, atol=1e-5)
    bias = (arrived / rounds - gradient).abs().max()
    assert bias <= 1.0 / (7 if dtype == "int4" else 127) / rounds
    if dtype != "bf16":
        assert (without / rounds - gradient).abs().max() > 10 * bias


def test_without_rounding_there_is_no_residual() -> None:
    gradient = _values(2)
    assert torch.equal(decode(encode_with_feedback(gradient, None, "fp32"), gradient.numel(), "fp32"), gradient)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_outer_step_is_torchs_nesterov_sgd(decay: float) -> None:
    weights, momentum = _values(3), torch.zeros(3 * BLOCK)
    expected = weights.clone().requires_grad_()
    optimizer = torch.optim.SGD([expected], lr=0.7, momentum=decay, nesterov=decay > 0)
    for step in range(4):
        gradient = _values(10 + step)
        expected.grad = gradient.clone()
        optimizer.step()
        nesterov_(weights, momentum, gradient, 0.7, decay)
    torch.testing.assert_close(weights, expected.detach(), rtol=1e-6, atol=1e-6)


def test_a_late_step_keeps_the_steps_made_since_or_mixes() -> None:
    synchronised, own, sent = torch.tensor([10.0]), torch.tensor([3.0]), torch.tensor([2.5])
    assert late_weights(synchronised, own, sent, None).item() == 10.5
    assert late_weights(synchronised, own, sent, 0.25).item() == pytest.approx(0.75 * 10 + 0.25 * 3)
    assert late_weights(synchronised, own, None, None).item() == 10.0
