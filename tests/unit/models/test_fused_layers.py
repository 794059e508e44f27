"""Others' norms and feed-forwards on our passes: only where they compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainwright.models.fused_layers import fuse_layers

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip


def build(family: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "head_dim": 8, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("family", "layers"),
    # Two norms and a feed-forward a layer, the last norm; Qwen3's norms of queries and keys too.
    [("Llama", 7), ("Mistral", 7), ("Qwen2", 7), ("Qwen3", 11)],
)
def test_losses_and_gradients_stay(family: str, layers: int) -> None:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (False, True):
        model = build(family)
        names = [name for name, _ in model.named_parameters()]
        assert fuse_layers(model) == layers if fused else True
        assert [name for name, _ in model.named_parameters()] == names
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), (fused_loss, fused_gradients) = found
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(gradients, fused_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_computes_otherwise_is_left_alone() -> None:
    assert fuse_layers(build("Gemma")) == 0  # 1 + weight, and GELU
    assert fuse_layers(build("Llama", hidden_act="gelu")) == 5  # the norms alone
    assert fuse_layers(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))) == 0


def test_a_second_time_changes_nothing() -> None:
    model = build("Llama")
    assert (fuse_layers(model), fuse_layers(model)) == (7, 0)
