"""Attention of short bf16 sequences by large products: fp64's result and gradients, no worse than torch's own kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.fused import product_attention as module
from trainwright.fused.product_attention import product_attention
from trainwright.models import attention

B, H, T, E = 3, 4, 37, 16


def _tensors(groups: int, length: int) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (H, groups, groups)
    return [torch.randn(B, length, n, E).bfloat16().transpose(1, 2).requires_grad_() for n in heads]


def _with_gradients(function: Any, tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, gradient.to(out.dtype))]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("block", "room"), [(128, 1 << 20), (16, 1), (16, 2 * H * 16 * T), (37, 1)])
def test_it_is_attention_as_torch_makes_it(groups: int, block: int, room: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_ROOM", room)
    tensors = _tensors(groups, T)
    gradient = torch.randn(B, H, T, E)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != H)

    expected = _with_gradients(plain, [t.detach().double().requires_grad_() for t in tensors], gradient)
    usual = _with_gradients(plain, tensors, gradient)
    found = _with_gradients(product_attention, tensors, gradient)
    for ours, torchs, exact in zip(found, usual, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == exact.shape
        assert _error(ours, exact) <= 1.3 * _error(torchs, exact) + 1e-3


def test_large_scores_keep_their_precision() -> None:
    """Scores of 50 and more rounded to bf16 would be a quarter off."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, E).bfloat16() * factor for factor in (6, 6, 1))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert _error(product_attention(q, k, v), exact) < 4e-3


@pytest.mark.parametrize("groups", [4, 2])
def test_compiled_it_is_the_same(groups: int) -> None:
    tensors = _tensors(groups, T)
    gradient = torch.randn(B, H, T, E)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: product_attention(q, k, v) * 1.0, backend="aot_eager")
    pairs = zip(
        _with_gradients(compiled, tensors, gradient), _with_gradients(product_attention, tensors, gradient), strict=True
    )
    for a, b in pairs:
        assert torch.equal(a, b)


def test_queries_keys_values_and_the_softmax_alone_are_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_BLOCK", 16)
    kept: list[Tensor] = []
    tensors = _tensors(2, T)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = product_attention(*tensors)
    (softmax,) = (t for t in kept if t.data_ptr() not in {tensor.data_ptr() for tensor in tensors})
    assert len(kept) == 4
    assert softmax.dtype == torch.bfloat16
    assert softmax.numel() == B * H * (16 * 16 + 16 * 32 + 5 * T)  # of the blocks 16, 16 and 5 queries long
    assert not softmax.requires_grad
    assert softmax.float().sum().item() == pytest.approx(B * H * T, rel=1e-3)
    assert out.grad_fn is not None


def test_its_inputs_are_left_alone() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [t.detach().to(dtype)[:1].contiguous() for t in _tensors(H, T)]
        before = [t.clone() for t in tensors]
        product_attention(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_where_it_serves(monkeypatch: Any) -> None:
    q, k, v = _tensors(H, T)
    one = _tensors(2, T)
    monkeypatch.setattr(module, "widens", lambda x: False)
    monkeypatch.setattr(module, "SERVES", True)
    assert not module.by_products(q, k, v)
    monkeypatch.setattr(module, "SHORTEST", T)
    assert module.by_products(q, k, v)
    assert module.by_products(*one)
    calls: list[bool] = []
    monkeypatch.setattr("trainwright.fused.attention.product_attention", lambda *_: calls.append(True))
    attention.attend(q, k, v, None)
    with torch.no_grad():
        attention.attend(q, k, v, None)
    attention.attend(q, k, v, torch.ones(1, 1, T, T, dtype=torch.bool))
    assert calls == [True]
    assert not module.by_products(q.float(), k.float(), v.float())
    assert not module.by_products(q, k, v[..., :8])
    assert not module.by_products(q[:, :, -1:], k, v)  # generation
    long = q.repeat(1, 1, 30, 1)
    assert not module.by_products(long, long, long)
    monkeypatch.setattr(module, "SERVES", False)
    assert not module.by_products(q, k, v)
