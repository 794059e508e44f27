"""Our models as Hugging Face folders: the same logits there, and the same model back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from trainwright.checkpoint.export import export_huggingface, huggingface_name, settings_from_huggingface
from trainwright.checkpoint.weights import load_pretrained
from trainwright.errors import ModelError
from trainwright.models.build import from_config_dict
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.transformer import Transformer, TransformerSettings

transformers = pytest.importorskip("transformers")

BASE = TransformerSettings(
    vocab_size=51, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=40, head_dim=8, rope_theta=5e5, norm_eps=1e-6
)
VARIANTS = {
    "grouped, tied": BASE,
    "untied": replace(BASE, tied=False),
    "one head each, wide heads": replace(BASE, kv_heads=4, head_dim=12),
    "qk-norm": replace(BASE, qk_norm=True, tied=False, head_dim=16),
    "dropout": replace(BASE, dropout=0.3),
}


def model_of(settings):
    torch.manual_seed(0)
    model = Transformer(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: at one they would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def parameters(model):
    return ((name, p.detach()) for name, p in model.named_parameters())


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_hugging_face_gives_the_same_logits_and_we_read_it_back(settings, tmp_path):
    model = model_of(settings)
    ids = torch.randint(0, 51, (2, 17))
    export_huggingface(model, parameters(model), tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if settings.qk_norm else "LlamaForCausalLM")
    expected = model(ids).logits
    assert (theirs.eval()(ids).logits - expected).abs().max().item() <= 1e-5
    back = Transformer(settings_from_huggingface(tmp_path)).eval()
    assert back.settings == replace(settings, dropout=0.0)
    load_pretrained(back, tmp_path, rename=huggingface_name)
    assert torch.equal(back(ids).logits, expected)


def test_what_transformers_saves_is_read(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=40, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model = Transformer(settings_from_huggingface(tmp_path))
    load_pretrained(model, tmp_path, rename=huggingface_name)
    ids = torch.randint(0, 51, (2, 64))
    assert (theirs(ids).logits - model(ids).logits).abs().max().item() <= 1e-5


def test_a_narrow_format_several_files_and_the_tokenizer(tmp_path):
    model = model_of(BASE)
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    files = export_huggingface(
        model, parameters(model), out, dtype=torch.bfloat16, tokenizer_folder=source, max_shard_bytes=10_000
    )
    assert {"config.json", "tokenizer.json"} <= set(files)
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.norm.weight, model.norm.weight.bfloat16())


def test_a_hugging_face_model_keeps_its_config(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=51, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    export_huggingface(model, parameters(model), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 51, (1, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_lstm_comes_back_from_its_folder(tmp_path):
    torch.manual_seed(0)
    model = LstmLanguageModel(LstmSettings(31, 8, 8, 2))
    export_huggingface(model, parameters(model), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    again = from_config_dict(config).to_empty(device="cpu")
    load_pretrained(again, tmp_path)
    ids = torch.randint(0, 31, (1, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_ours_lacks_is_refused(tmp_path, change, words):
    export_huggingface(model_of(BASE), [], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=words):
        settings_from_huggingface(tmp_path)


def test_a_model_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match="full_state_dict"):
        export_huggingface(torch.nn.Linear(2, 2), [], tmp_path)


def test_a_model_of_build_causal_is_exported_under_hugging_faces_name(tmp_path):
    from trainwright.models.pretrained import build_causal

    config = transformers.LlamaConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40
    )
    model = build_causal(config)
    export_huggingface(model, [(name, torch.zeros(p.shape)) for name, p in model.named_parameters()], tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
