"""Attention of a narrow format by way of fp32: fp32's result and gradients on the same values, rounded, with half kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.fused.attention import wide_attention

B, H, T, E = 2, 4, 37, 16


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_fp32_attention_rounded_once(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    narrow = [torch.randn(B, T, n, E).to(dtype).transpose(1, 2).requires_grad_() for n in (H, groups, groups)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    gradient = torch.randn(B, H, T, E).to(dtype)
    found = wide_attention(*narrow)
    found.backward(gradient)
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=groups != H)
    expected.backward(gradient.float())
    assert torch.equal(found, expected.to(dtype))
    for a, b in zip(narrow, wide, strict=True):
        assert a.grad is not None and b.grad is not None  # noqa: PT018
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("groups", [4, 2])
def test_compiled_it_is_the_same(groups: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(B, n, T, E).bfloat16().requires_grad_() for n in (H, groups, groups)]
    gradient = torch.randn(B, H, T, E).bfloat16()

    def run(function: Any) -> list[Tensor]:
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, gradient)]

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: wide_attention(q, k, v) * 1.0, backend="aot_eager")
    for a, b in zip(run(compiled), run(wide_attention), strict=True):
        assert torch.equal(a, b)


def test_what_is_kept_for_backward_is_narrow() -> None:
    kept: list[Tensor] = []
    q, k, v = (torch.randn(B, H, T, E).bfloat16().requires_grad_() for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wide_attention(q, k, v)
    assert {t.dtype for t in kept if t.ndim == 4} == {torch.bfloat16}
    assert sum(t.numel() for t in kept if t.dtype == torch.float32) == B * H * T
