"""Hugging Face models: built without memory, filled, trained on labels that are shifted already."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.errors import ModelError
from trainwright.fused.linear import widen_products
from trainwright.models.pretrained import (
    PreShiftedCausalLM,
    build_causal,
    build_huggingface,
    count_valid_tokens,
    resolve_folder,
    shifts_labels,
)

transformers = pytest.importorskip("transformers")
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def config_of(kind):
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **NO_IDS
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **NO_IDS,
        )  # fmt: skip
    if kind == "gemma2":  # a soft cap on the logits: not a plain head
        return transformers.Gemma2Config(
            vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, intermediate_size=24, final_logit_softcapping=0.1, **NO_IDS,
        )  # fmt: skip
    if kind == "bert":
        return transformers.BertConfig(
            vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    return transformers.T5Config(
        vocab_size=37, d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=24, decoder_start_token_id=0
    )


def filled(module):
    """Any values, on the CPU."""
    module.to_empty(device="cpu") if any(p.is_meta for p in module.parameters()) else None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_each_kind_builds_without_memory_and_with_all_recipes(kind, name):
    module = build_huggingface(config_of(kind))
    assert type(module).__name__ == name
    assert all(p.is_meta and p.dtype == torch.float32 for p in module.parameters())
    assert not any(b.is_meta for b in module.buffers())


def test_the_architecture_in_the_config_decides():
    config = config_of("bert")
    config.architectures = ["BertForSequenceClassification"]
    assert type(build_huggingface(config)).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_pre_shifted_labels_give_the_loss_of_the_logits(kind):
    module = build_causal(config_of(kind))
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    filled(module)
    for name, buffer in buffers.items():
        module.get_buffer(name).copy_(buffer)
    ids = torch.randint(0, 37, (2, 9))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, :4] = -100
    out = module(ids, labels=labels)
    logits = module(input_ids=ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(out.loss, expected, atol=1e-5)
    assert out.tokens.item() == 12
    out.loss.backward()
    fused = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    expected.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(module.parameters(), fused, strict=True))
    masked = module(ids, labels=torch.full_like(labels, -100))
    assert masked.loss.item() == 0.0


def test_pre_shifted_is_hugging_faces_own_loss():
    module = build_causal(config_of("llama"))
    inv_freq = module.model.rotary_emb.inv_freq.clone()
    filled(module).model.rotary_emb.inv_freq.copy_(inv_freq)
    plain = transformers.LlamaForCausalLM(config_of("llama"))
    plain.load_state_dict(module.state_dict())
    ids = torch.randint(0, 37, (2, 9))
    ours = module(input_ids=ids[:, :-1], labels=ids[:, 1:]).loss
    assert torch.allclose(ours, plain(input_ids=ids, labels=ids).loss, atol=1e-5)


def test_who_shifts_and_what_is_counted():
    labels = torch.tensor([[1, 2, -100, 4], [-100, 2, 3, 4]])
    shifting = transformers.LlamaForCausalLM(config_of("llama"))
    assert count_valid_tokens(shifting, labels).item() == 5
    for module in (
        build_causal(config_of("llama")),
        build_huggingface(config_of("bert")),
        build_huggingface(config_of("t5")),
        torch.nn.Linear(2, 2),
    ):
        assert not shifts_labels(module)
        assert count_valid_tokens(module, labels).item() == 6


def test_hugging_faces_generate_works_on_a_pre_shifted_model():
    module = build_causal(config_of("llama"))
    inv_freq = module.model.rotary_emb.inv_freq.clone()
    filled(module).model.rotary_emb.inv_freq.copy_(inv_freq)
    assert isinstance(module, PreShiftedCausalLM)
    ids = torch.tensor([[1, 2, 3]])
    out = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)


def test_a_model_that_is_not_causal_is_refused_for_next_token_training():
    with pytest.raises(ModelError, match="not a causal"):
        build_causal(config_of("bert"))


def test_a_name_that_nobody_has_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="--local-dir"):
        resolve_folder("nobody/no-such-model")


def test_a_gguf_file_is_pointed_to_its_converter(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="convert_gguf"):
        resolve_folder(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_widened_products_change_nothing_but_rounding(kind):
    torch.manual_seed(0)
    model_class = {"llama": transformers.LlamaForCausalLM, "gpt2": transformers.GPT2LMHeadModel}[kind]
    module = model_class(config_of(kind)).eval()
    ids = torch.randint(0, 37, (2, 9))
    exact = module(ids).logits
    names = [name for name, _ in module.named_parameters()]
    assert widen_products(module) > 4
    assert [name for name, _ in module.named_parameters()] == names
    assert torch.allclose(module(ids).logits, exact, atol=1e-6)
    assert torch.allclose(module.bfloat16()(ids).logits.float(), exact, atol=0.05)
