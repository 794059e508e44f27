"""From the config to a model."""

from __future__ import annotations

import pytest
import torch

from trainwright.config.model_schema import ModelConfig
from trainwright.errors import ConfigError, ContradictionError
from trainwright.models.build import build, from_config_dict, is_ours, transformer_settings
from trainwright.models.presets import PRESETS

# Parameters of the published models, with their own vocabulary.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_build_on_the_meta_device_in_their_published_sizes(name):
    model = ModelConfig.model_validate({"preset": name, "transformer": {"layers": 1}})
    module = build(model)
    assert all(p.is_meta for p in module.parameters())
    block = sum(p.numel() for p in module.blocks.parameters())
    count = sum(p.numel() for p in module.parameters()) + (PRESETS[name].layers - 1) * block
    assert count == PUBLISHED.get(name, count)


def test_published_sizes_are_of_presets():
    assert set(PUBLISHED) <= set(PRESETS)


@pytest.mark.parametrize(("name", "millions"), [("llama-1m", 1), ("llama-5m", 5), ("llama-10m", 10), ("llama-30m", 30)])
def test_small_presets_are_named_by_their_blocks(name, millions):
    module = build(ModelConfig(preset=name), vocab_size=100)
    assert sum(p.numel() for p in module.blocks.parameters()) == pytest.approx(millions * 1e6, rel=0.08)
    assert module.vocab_size == 100


def test_dimensions_go_over_a_presets():
    model = ModelConfig.model_validate({"preset": "llama-5m", "transformer": {"layers": 2, "heads": 8, "dropout": 0.1}})
    settings = transformer_settings(model.preset, model.transformer, 64)
    assert (settings.layers, settings.heads, settings.head_dim, settings.dropout) == (2, 8, 32, 0.1)
    assert settings.dim == PRESETS["llama-5m"].dim


def test_dimensions_alone():
    model = ModelConfig.model_validate({"transformer": {"dim": 64, "layers": 1, "heads": 4}})
    settings = transformer_settings(None, model.transformer, 50)
    assert (settings.kv_heads, settings.head_dim, settings.ffn_dim) == (4, 16, 192)


def test_the_configs_vocabulary_wins_over_the_tokenizers():
    model = ModelConfig.model_validate({"lstm": {"vocab_size": 30, "embedding_dim": 8, "hidden_dim": 8, "layers": 1}})
    assert build(model, vocab_size=20).vocab_size == 30


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"preset": "lama-10m"}, "model.preset=llama-10m"),
        ({}, "model.preset=llama-10m"),
        ({"preset": "llama-1m", "lstm": {}}, "one of preset"),
        ({"lstm": {}}, "vocab_size"),
        ({"transformer": {"dim": 64}}, "without vocab_size, layers, heads"),
        ({"transformer": {"dim": 64, "layers": 1, "heads": 5, "vocab_size": 9}}, "heads: 4"),
    ],
)
def test_wrong_models_are_refused(model, words):
    with pytest.raises(ConfigError, match=words):
        build(ModelConfig.model_validate(model))


def test_pretrained_weights_need_a_hugging_face_model():
    with pytest.raises(ContradictionError, match="huggingface"):
        build(ModelConfig(preset="llama-1m", weights="pretrained"))


@pytest.mark.parametrize("model", [{"preset": "llama-1m"}, {"lstm": {"embedding_dim": 8, "hidden_dim": 8}}])
def test_a_model_comes_back_from_its_own_config(model):
    first = build(ModelConfig.model_validate(model), vocab_size=40)
    again = from_config_dict(first.config)
    assert again.config == first.config
    assert is_ours(again)
    assert not is_ours(torch.nn.Linear(1, 1))
