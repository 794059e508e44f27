"""RMSNorm, rotary embedding and SwiGLU against torch's plain operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.fused.elementwise import RMSNorm, rms_norm, rotate, swiglu

FORMATS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def gradients(out, weighting, inputs):
    return torch.autograd.grad((out.to(weighting.dtype) * weighting).sum(), inputs)


def close(mine, exact, tolerance):
    scale = exact.double().abs().max().clamp(min=1e-3)
    return ((mine.double() - exact.double()).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
def test_rms_norm(dtype, tolerance):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 48)).to(dtype).requires_grad_()
    weight = torch.randn(48).to(dtype).requires_grad_()
    weighting = torch.randn(2, 5, 48, dtype=torch.float64)
    mine = rms_norm(x, weight, 1e-5)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.rms_norm(wide_x, (48,), wide_weight, 1e-5)
    assert mine.dtype == dtype
    assert close(mine, exact, tolerance)
    for a, b in zip(
        gradients(mine, weighting, (x, weight)), gradients(exact, weighting, (wide_x, wide_weight)), strict=True
    ):
        assert a.dtype == dtype
        assert close(a, b, tolerance)


def test_rms_norm_of_zeros_and_of_a_frozen_weight():
    x = torch.zeros(3, 8, requires_grad=True)
    norm = RMSNorm(8, eps=1e-5).requires_grad_(False)
    norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert norm.weight.grad is None
    plain = torch.nn.RMSNorm(8)  # eps None: the format's
    y = torch.randn(3, 8)
    torch.testing.assert_close(rms_norm(y, plain.weight, None), plain(y))


@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
def test_rotate(dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16).to(dtype).requires_grad_()
    angle = torch.randn(5, 1, 8)
    weighting = torch.randn(x.shape, dtype=torch.float64)
    wide = x.detach().double().requires_grad_()
    first, second = wide.chunk(2, dim=-1)
    cos, sin = angle.cos().double(), angle.sin().double()
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    # A slice of a wider product, as the heads of a packed projection are: not contiguous.
    strided = torch.cat((x, x), dim=-1)[..., 16:]
    mine = rotate(strided, angle.cos(), angle.sin())
    assert mine.dtype == dtype
    assert close(mine, exact, tolerance)
    assert close(gradients(mine, weighting, x)[0], gradients(exact, weighting, wide)[0], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
def test_swiglu(dtype, tolerance):
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 32).to(dtype).requires_grad_() for _ in range(2))
    wide_gate, wide_up = (t.detach().double().requires_grad_() for t in (gate, up))
    weighting = torch.randn(4, 32, dtype=torch.float64)
    mine, exact = swiglu(gate, up), F.silu(wide_gate) * wide_up
    assert close(mine, exact, tolerance)
    for a, b in zip(
        gradients(mine, weighting, (gate, up)), gradients(exact, weighting, (wide_gate, wide_up)), strict=True
    ):
        assert close(a, b, tolerance)


def test_what_backward_keeps():
    """An activation's worth for each input, and for the norm one number a row more; no fp32 copies of bf16 inputs."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.itemsize)
        return tensor

    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, 1e-5)
    assert sum(kept) == 64 * 128 * 2 + 128 * 2 + 64 * 4
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(x, x)
    assert sum(kept) == 2 * 64 * 128 * 2
