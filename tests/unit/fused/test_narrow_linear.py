"""Products of narrow formats by way of fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.fused import linear as narrow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_widened_product_is_the_exact_one_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(narrow, "_cpu_lacks", lambda dtype: True)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    w = torch.randn(32, 64).to(dtype).requires_grad_()
    out = narrow.linear(x, w)
    assert out.dtype == dtype
    xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = F.linear(xd, wd)
    upstream = torch.randn(expected.shape).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    unit = torch.finfo(dtype).eps
    for got, want in ((out, expected), (x.grad, xd.grad), (w.grad, wd.grad)):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= unit * want.abs().max()


def test_wide_formats_are_left_alone(monkeypatch):
    monkeypatch.setattr(narrow, "_cpu_lacks", lambda dtype: True)
    layer = narrow.Linear(4, 6)
    x = torch.randn(2, 4)
    assert not narrow.widens(x)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
