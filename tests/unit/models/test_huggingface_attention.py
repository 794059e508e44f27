"""Hugging Face models whose attention goes through fp32: the values of fp32's, less memory kept, the same model otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.fused import attention as fused_attention
from trainwright.fused import linear
from trainwright.models.huggingface_attention import NAME, fuse_attention

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LACKED", (torch.float16, torch.bfloat16))


def _llama(**more: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=37, intermediate_size=40, **sizes, **more))


def _gradients(model: Any, **inputs: Any) -> list[torch.Tensor]:
    tokens = torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens, **inputs).loss.backward()
    return [p.grad.float() for p in model.parameters()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", ["wide_attention", "product_attention"])
def test_gradients_are_those_of_bf16(way: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "product_attention":
        monkeypatch.setattr(linear, "_LACKED", (torch.float16,))
        monkeypatch.setattr("trainwright.fused.product_attention.SERVES", True)
        monkeypatch.setattr("trainwright.fused.product_attention.SHORTEST", 1)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"attention_mask": mask} if padded else {}
    exact = _gradients(_llama(), **inputs)
    model = _llama().bfloat16()
    assert fuse_attention(model) == 1
    assert model.config._attn_implementation == NAME
    plain: list[bool] = []
    real = getattr(fused_attention, way)
    monkeypatch.setattr(fused_attention, way, lambda *a: plain.append(True) or real(*a))
    found = _gradients(model, **inputs)
    assert len(plain) == (0 if padded else 2)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-4


def test_what_is_not_plain_causal_attention_stays_theirs() -> None:
    model = _llama(attn_implementation="eager")
    assert fuse_attention(model) == 0
    assert model.config._attn_implementation == "eager"
    assert fuse_attention(torch.nn.Linear(2, 2)) == 0
    wide = _llama()
    fuse_attention(wide)
    for a, b in zip(_gradients(wide), _gradients(_llama()), strict=True):
        assert torch.equal(a, b), "fp32 is untouched"


def test_it_generates_and_is_saved_under_the_usual_name(tmp_path: Any) -> None:
    model = _llama().bfloat16().eval()
    tokens = torch.arange(5)[None]
    fuse_attention(model)
    assert model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 9)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
