"""Our transformer against Hugging Face's Llama and Qwen3, and its own promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.errors import ConfigError, UsageError
from trainwright.models.dropout import dropout_context
from trainwright.models.transformer import Transformer, TransformerSettings

SMALL = TransformerSettings(
    vocab_size=61, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, head_dim=8, max_sequence_length=64
)


def small(**changes):
    torch.manual_seed(0)
    return Transformer(TransformerSettings(**{**SMALL.__dict__, **changes}))


def tokens(batch=2, length=10):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(3))


def test_the_loss_is_the_mean_over_valid_labels():
    model, ids = small(), tokens()
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    out = model(ids, labels=labels)
    logits = model(ids).logits
    assert out.logits is None
    assert out.tokens.item() == 18
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(out.loss, expected, atol=1e-6)
    assert torch.allclose(out.loss_sum, expected * 18, atol=1e-4)
    assert torch.equal(model(ids, labels=labels, return_logits=True).logits, logits)


def test_gradients_are_those_of_plain_logits():
    model, ids = small(), tokens()
    model(ids, labels=ids).loss.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, fused[name], atol=1e-6), name


def test_an_all_masked_batch_gives_zero():
    model, ids = small(), tokens()
    out = model(ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_formats_come_near_fp32(dtype):
    model, ids = small(), tokens()
    wide = model(ids, labels=ids).loss
    out = model.to(dtype)(ids, labels=ids)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.loss.item() == pytest.approx(wide.item(), rel=1e-6 if dtype == torch.float64 else 1e-2)
    out.loss.backward()


def test_the_model_is_causal():
    model, ids = small(), tokens()
    changed = ids.clone()
    changed[:, 6:] = 0
    assert torch.allclose(model(ids).logits[:, :6], model(changed).logits[:, :6], atol=1e-6)


def test_positions_given_are_the_default_ones():
    model, ids = small(), tokens()
    positions = torch.arange(10).expand(2, 10)
    assert torch.allclose(model(ids).logits, model(ids, position_ids=positions).logits, atol=1e-6)


def test_documents_do_not_see_each_other():
    model, ids = small(), tokens(batch=1)
    documents = torch.tensor([[0] * 4 + [1] * 6])
    positions = torch.tensor([[*range(4), *range(6)]])
    packed = model(ids, position_ids=positions, document_ids=documents).logits
    assert torch.allclose(packed[:, :4], model(ids[:, :4]).logits, atol=1e-5)
    assert torch.allclose(packed[:, 4:], model(ids[:, 4:]).logits, atol=1e-5)


def test_a_cache_gives_the_logits_of_the_whole_sequence():
    model, ids = small().eval(), tokens()
    whole = model(ids).logits
    cache = model.new_cache(2, 10)
    parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 8), (8, 10))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    with pytest.raises(UsageError, match="up to position 11"):
        model(ids[:, :1], cache=cache)


def test_dropout_follows_the_sample_and_is_off_in_evaluation():
    model, ids = small(dropout=0.4), tokens(batch=3)
    with dropout_context(7, 2, torch.tensor([4, 5, 6])):
        whole = model(ids).logits
    with dropout_context(7, 2, torch.tensor([5])):
        alone = model(ids[1:2]).logits
    with dropout_context(7, 3, torch.tensor([5])):
        later = model(ids[1:2]).logits
    assert torch.allclose(whole[1:2], alone, atol=1e-5)
    assert not torch.allclose(later, alone, atol=1e-3)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_tied_head_is_one_parameter():
    assert "head.weight" not in dict(small().named_parameters())
    untied = small(tied=False)
    assert untied.head.weight is not untied.embedding.weight


def test_flops_count_matrices_and_attention():
    model = small()
    matrices = sum(p.numel() for p in model.blocks.parameters()) + 61 * 32
    assert model.flops_per_token(16) == 6 * matrices + 12 * 2 * 4 * 8 * 16


def test_tables_made_in_inference_mode_serve_training():
    model, ids = small(), tokens()
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("change", "words"), [({"kv_heads": 3}, "kv_heads"), ({"head_dim": 7}, "even"), ({"dropout": 1.0}, "dropout")]
)
def test_impossible_dimensions_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        small(**change)
