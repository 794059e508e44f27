"""Hugging Face's own losses through the fused one, their code unchanged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import trainwright as tw
from trainwright.errors import ModelError
from trainwright.models.head import head_of
from trainwright.models.lazy_logits import LazyLogits, lazy_logits, make_lazy

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def _models():
    yield "llama", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))
    config = {"vocab_size": 43, "n_embd": 16, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    yield "gpt2", lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, attn_pdrop=0.0))
    gemma = {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "final_logit_softcapping": 3.0}
    yield "gemma2", lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**gemma))
    t5 = {"vocab_size": 43, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    yield "t5", lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=0))
    yield (
        "cohere",
        lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0)),
    )


def _loss(model, tokens, labels):
    out = model(input_ids=tokens, labels=labels)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out, gradients


@pytest.mark.parametrize(("kind", "build"), list(_models()), ids=lambda v: v if isinstance(v, str) else "")
def test_the_loss_and_gradients_of_a_model_are_its_own(kind, build):
    torch.manual_seed(0)
    model = build().train()
    tokens, labels = torch.randint(0, 43, (2, 3, 7))
    labels[0, 2:5] = -100
    plain, expected = _loss(model, tokens, labels)
    head = head_of(model)
    make_lazy(head)
    made = []
    project = head.forward.args[1]
    with lazy_logits():
        head.forward = type(head.forward)(head.forward.func, head, lambda x: made.append(1) or project(x))
        out, found = _loss(model, tokens, labels)
    assert isinstance(out.logits, LazyLogits)
    assert not made, "the logits were made whole"
    assert torch.allclose(out.loss, plain.loss, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6), name
    assert torch.allclose(out.logits + 0.0, plain.logits, atol=1e-5)  # looked at, they are there
    assert torch.equal(out.logits.argmax(-1), plain.logits.argmax(-1))
    assert isinstance(model(input_ids=tokens, labels=labels).logits, torch.Tensor), "outside, logits are logits"


def test_what_the_fused_loss_cannot_do_is_done_with_logits():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, bias=False)
    hidden, target = torch.randn(5, 8), torch.randint(0, 11, (5,))
    logits = head(hidden)
    make_lazy(head)
    with lazy_logits():
        for options in (
            {"reduction": "none"},
            {"label_smoothing": 0.1},
            {"weight": torch.rand(11)},
            {"ignore_index": 3},
        ):
            assert torch.allclose(
                F.cross_entropy(head(hidden), target, **options), F.cross_entropy(logits, target, **options)
            )
        soft = torch.softmax(torch.randn(5, 11), dim=1)
        assert torch.allclose(F.cross_entropy(head(hidden), soft), F.cross_entropy(logits, soft))
        lazy = head(hidden)
        assert torch.equal(torch.log_softmax(lazy, dim=-1), torch.log_softmax(logits, dim=-1))
        assert torch.equal(lazy.t(), logits.t())
        assert torch.equal(lazy[:, 3], logits[:, 3])
        assert torch.equal(lazy[torch.tensor([1, 2])], logits[torch.tensor([1, 2])])
        assert torch.equal(2.0 - lazy, 2.0 - logits)
        assert lazy.view(-1).shape == (55,)
        assert len(lazy) == 5
        assert lazy.size(-1) == 11
        for rows in (
            lazy[1:4],
            lazy.view(1, 5, 11),
            lazy.flatten(0, 0),
            lazy.float().contiguous(),
            lazy / 2.0,
            lazy * 3,
        ):
            assert isinstance(rows, LazyLogits)
        assert torch.allclose((lazy / 2.0).logits, logits / 2.0)


def test_the_engine_trains_a_models_own_loss_without_whole_logits():
    torch.manual_seed(0)
    model = dict(_models())["llama"]()
    tokens = torch.randint(0, 43, (2, 7))
    expected = model(input_ids=tokens, labels=tokens).loss.item()
    with tw.initialize(model=model, config={}) as engine:
        out = engine(tokens, labels=tokens)
        assert isinstance(out.logits, LazyLogits)
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        engine.backward(out.loss)
        engine.step()
        with torch.no_grad():
            assert isinstance(engine(tokens, labels=tokens).logits, torch.Tensor)


def test_terms_of_the_loss_where_no_head_is_known_are_refused():
    with pytest.raises(ModelError, match="get_output_embeddings"):
        tw.initialize(model=torch.nn.Linear(3, 3), config={"loss": {"z_loss": 1e-4}})
