"""The chunked projection + cross-entropy against logits + torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.fused import cross_entropy as fused
from trainwright.fused import linear as narrow
from trainwright.fused.token_losses import PLAIN, LossTerms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(dtype, tokens=37, width=16, vocab=53):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden, weight, labels, scale, terms=PLAIN):
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.t()
    if terms.softcap:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=terms.label_smoothing)
    loss = loss + terms.z_loss * logits[labels != -100].logsumexp(dim=1).square().sum()
    (loss * scale).backward()
    return loss, h.grad, w.grad


def close(a, b, dtype):
    bound = TOLERANCE[dtype] * b.abs().max().item()
    assert (a.double() - b).abs().max().item() <= bound


@pytest.mark.parametrize("tile", [53 * 3, 1 << 21])
@pytest.mark.parametrize("chunk", [53 * 4, 53 * 32, 1 << 24])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("native", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, chunk, tile, native, monkeypatch):
    monkeypatch.setattr(fused, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(fused, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(fused, "_PRODUCT_ELEMENTS", tile)
    if native:  # the path of machines that multiply the format themselves
        monkeypatch.setattr(narrow, "_cpu_lacks", lambda dtype: False)
    hidden, weight, labels = inputs(dtype)
    loss, count = fused.linear_cross_entropy(hidden, weight, labels)
    (loss * 0.25).backward()
    expected = reference(hidden, weight, labels, 0.25)
    assert count.item() == (labels != -100).sum().item()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss, expected[0], dtype)
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    close(hidden.grad, expected[1], dtype)
    close(weight.grad, expected[2], dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "terms",
    [LossTerms(label_smoothing=0.1), LossTerms(z_loss=0.01), LossTerms(softcap=2.0), LossTerms(0.2, 0.05, 1.5)],
    ids=["smoothing", "z-loss", "softcap", "all"],
)
def test_terms_of_the_loss(dtype, terms, monkeypatch):
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 53 * 32)
    monkeypatch.setattr(fused, "_TILE_ELEMENTS", 53 * 3)
    hidden, weight, labels = inputs(dtype)
    loss, _ = fused.linear_cross_entropy(hidden, weight, labels, terms=terms)
    (loss * 0.25).backward()
    expected = reference(hidden, weight, labels, 0.25, terms)
    close(loss, expected[0], dtype)
    close(hidden.grad, expected[1], dtype)
    close(weight.grad, expected[2], dtype)
    logits = hidden.detach().double() @ weight.detach().double().t()
    close(fused.summed_cross_entropy(logits, labels, terms)[0], expected[0], dtype)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_whose_probability_fp32_cannot_hold(dtype, native, monkeypatch):
    """Some tokens' losses are beyond 100, where exp(-loss) is 0 or has lost its digits."""
    monkeypatch.setattr(narrow, "_cpu_lacks", lambda dtype: dtype.itemsize == 2 and not native)
    monkeypatch.setattr(fused, "_TILE_ELEMENTS", 53 * 3)
    hidden, weight, labels = inputs(dtype)
    with torch.no_grad():
        hidden[3:9] *= 60.0
    expected = reference(hidden, weight, labels, 1.0)
    losses = F.cross_entropy(hidden.detach().double() @ weight.detach().double().t(), labels, reduction="none")
    assert (losses > 104).sum() >= 2
    assert ((losses > 60) & (losses < 104)).sum() >= 1
    loss, _ = fused.linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    if native and dtype == torch.bfloat16:  # logits of 200 are rounded to whole numbers
        close(loss, expected[0], dtype)
        return
    close(loss, expected[0], torch.float32)
    close(hidden.grad, expected[1], dtype)
    close(weight.grad, expected[2], dtype)


def test_values_that_are_no_numbers_are_told():
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        hidden[3, 2] = float("nan")
    loss, _ = fused.linear_cross_entropy(hidden, weight, labels)
    assert loss.isnan()


def test_chunks_are_alike_and_of_whole_dozens_of_rows():
    def lengths(*words):
        return [part.stop - part.start for part in fused._chunks(*words)]

    assert lengths(2048, 49152, 384, 2) == [704, 704, 640]
    assert lengths(2048, 49152, 384, 4) == [384, 384, 384, 384, 384, 128]
    assert lengths(2048, 8192, 384, 2) == [1024, 1024]
    assert lengths(37, 53, 16, 2) == [37]
    assert lengths(0, 53, 16, 4) == []
    assert lengths(100, 1 << 22, 16, 4) == [15] * 6 + [10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_valid_label_gives_zero_loss_and_zero_gradients(dtype):
    hidden, weight, labels = inputs(dtype)
    loss, count = fused.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert count.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_fp16_gradients_below_its_range_survive_under_a_loss_scale(monkeypatch):
    monkeypatch.setattr(narrow, "_cpu_lacks", lambda dtype: False)
    # A spread-out softmax: gradients of about 1e-8, half precision's least is 6e-8.
    hidden = torch.full((4, 8), 1e-4, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(4096, 8, dtype=torch.float16, requires_grad=True)
    loss, _ = fused.linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64))
    (loss * 65536.0).backward()
    # d/dw of a class that is no label: sum over 4 tokens of 1e-4 / 4096, times the scale.
    assert weight.grad[100, 0].item() == pytest.approx(4e-4 / 4096 * 65536, rel=0.01)


def test_a_kept_graph_gives_the_same_gradients_twice():
    hidden, weight, labels = inputs(torch.float32)
    loss, _ = fused.linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * first)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = inputs(torch.float32)
    loss, _ = fused.linear_cross_entropy(hidden, weight.detach(), labels)
    loss.backward()
    close(hidden.grad, reference(hidden, weight, labels, 1.0)[1], torch.float32)
    with torch.no_grad():
        assert not fused.linear_cross_entropy(hidden, weight, labels)[0].requires_grad


def test_shapes_of_a_batch():
    hidden, weight, labels = inputs(torch.float32, tokens=12)
    flat, _ = fused.linear_cross_entropy(hidden, weight, labels)
    batched, _ = fused.linear_cross_entropy(hidden.view(3, 4, 16), weight, labels.view(3, 4))
    assert torch.equal(flat, batched)


def test_cross_entropy_of_logits_is_the_mean_over_valid_labels():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    assert torch.allclose(fused.cross_entropy(logits, labels), F.cross_entropy(logits.view(6, 7), labels.view(6)))
    loss = fused.cross_entropy(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    assert fused.cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
