"""Documents masked by blocks see what the mask of T x T lets them see. The kernel itself is tests/gpu's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from small import batches, transformer, with_values
from trainwright.models import attention
from trainwright.models.attention import BLOCK, DocumentBlocks, attend, block_mask, document_mask

LENGTH = 4 * BLOCK


def _documents(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    share = {"long": 1 / 300, "short": 1 / 20, "one": 0.0, "any order": 1 / 100}[kind]
    numbers = (torch.rand(2, LENGTH, generator=generator) < share).cumsum(1)
    return 7 - numbers % 5 if kind == "any order" else numbers


pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # the compiler's own look at the inputs
]


@pytest.fixture
def on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with FlexAttention's plain form in the kernel's place."""
    monkeypatch.setattr(attention, "_blocks_serve", lambda *_: True)
    monkeypatch.setattr(attention, "_flex", lambda: flex_attention)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # gradients on CPUs


@pytest.mark.parametrize("kind", ["long", "short", "one", "any order"])
def test_blocks_hold_what_the_mask_allows_and_no_more(kind: str) -> None:
    ids = _documents(kind)
    dense = document_mask(ids)[:, 0]
    tiles = dense.view(2, LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK).transpose(2, 3)
    some, all_ = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    mask = block_mask(ids)
    n = LENGTH // BLOCK
    for b in range(2):
        for i in range(n):
            partial = set(mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist())
            full = set(mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist())
            assert not partial & full
            assert {j for j in range(n) if some[b, i, j]} <= partial | full
            assert full <= {j for j in range(n) if all_[b, i, j]}
            assert all(j <= i for j in partial | full)
    if kind == "short":
        listed = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
        assert listed <= 2 * 2 * n, "what lies in other documents is left out"
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    assert torch.equal(mask.mask_mod(b, torch.zeros(()), q, k), dense)


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_by_blocks_is_attention_by_mask(groups: int, on_blocks: None) -> None:
    ids = _documents("short")

    def run(mask: Any) -> list[Tensor]:
        torch.manual_seed(0)
        q = torch.randn(2, 4, LENGTH, 16, requires_grad=True)
        k, v = (torch.randn(2, groups, LENGTH, 16, requires_grad=True) for _ in range(2))
        out = attend(q, k, v, mask)
        (out * torch.randn(out.shape)).sum().backward()
        return [out, *(one.grad for one in (q, k, v) if one.grad is not None)]

    for found, expected in zip(run(DocumentBlocks(ids)), run(document_mask(ids)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trains_on_blocks_as_on_the_mask(
    compiled: bool, on_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (torch.cat([part] * (LENGTH // part.shape[1] + 1), 1)[1:3, :LENGTH] for part in batches(1)[0])
    ids = _documents("short")

    def run() -> list[Tensor]:
        model = with_values(transformer)
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend="aot_eager")
        loss = model(x, labels=y, document_ids=ids).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    found = run()
    monkeypatch.setattr(attention, "_blocks_serve", lambda *_: False)
    for a, b in zip(found, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_compiled_is_found_out_before_and_said(on_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = torch.zeros(2, LENGTH, 8), _documents("long")
    assert attention._tried((4, 2, 8), x, ids)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(attention, "_flex", lambda: refuse)
    with pytest.warns(UserWarning, match=r"FlexAttention cannot be compiled here.*no compiler here"):
        assert not attention._tried((4, 2, 8), x, ids)
