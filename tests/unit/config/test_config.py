"""The config: coercion, overrides, sources, typos, contradictions, other frameworks' words, a fuzz."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.config import Config, load_config
from trainwright.config.foreign import FOREIGN
from trainwright.config.load import all_keys
from trainwright.errors import ConfigError, ContradictionError, TrainwrightError, UnknownKeyError


def test_values_are_coerced_and_bare_words_taken() -> None:
    config = load_config(
        {
            "optimizer": {"lr": "1e-3"},
            "batch": {"global_size": "64", "micro_size": "8"},
            "tokens": "1e9",
            "precision": "bf16",
        },
        ["zero=2", "lr_schedule=cosine", "stop_after=3h50m", "optimizer.betas=[0.9, 0.99]", "model=llama-10m"],
    ).config
    assert config.optimizer.lr == 1e-3
    assert config.batch.global_size == 64
    assert config.tokens == 10**9
    assert config.precision.dtype == "bf16"
    assert config.zero.stage == 2
    assert config.stop_after == 3 * 3600 + 50 * 60
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.model is not None
    assert config.model.preset == "llama-10m"


def test_a_section_in_braces_takes_the_whole_sections_place() -> None:
    base = {"optimizer": {"name": "muon", "momentum": 0.85, "options": {"ns_steps": 3}}, "batch": {"micro_size": 2}}
    resolved = load_config(base, ["optimizer={name: adamw, lr: 0.003}", "batch.accumulation=4"])
    assert resolved.config.optimizer.options == {}
    assert resolved.config.optimizer.momentum is None
    assert resolved.sources["optimizer.momentum"] == "default"
    assert (resolved.config.batch.micro_size, resolved.config.batch.accumulation) == (2, 4)
    assert base["optimizer"]["name"] == "muon", "the caller's own dict is left alone"
    kept = load_config(base, ["optimizer.lr=0.1", "zero=2"]).config
    assert (kept.optimizer.name, kept.optimizer.lr, kept.optimizer.momentum) == ("muon", 0.1, 0.85)


def test_every_value_knows_where_it_came_from_and_the_printed_config_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("zero: 3\noptimizer: {lr: 1e-4}\nfreeze: ['*.bias']\nsteps: 10\n")
    resolved = load_config(path, ["zero.stage=1"])
    assert resolved.sources["zero.stage"] == "override"
    assert resolved.sources["optimizer.lr"] == "run.yaml"
    assert resolved.sources["optimizer.weight_decay"] == "default"
    printed = tmp_path / "printed.yaml"
    printed.write_text(resolved.to_yaml())
    assert load_config(printed).config == resolved.config


@pytest.mark.parametrize(
    ("typo", "suggestion"),
    [
        ("gradient_clipp1ng", "gradient_clipping"),
        ("zero.stag", "zero.stage"),
        ("optimiser.lr", "optimizer"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("stage", "zero.stage"),
        ("precision.dytpe", "precision.dtype"),
        ("bf16_", "precision: bf16"),
        ("model.transformer.head", "model.transformer.heads"),
    ],
)
def test_an_unknown_key_names_the_nearest(typo: str, suggestion: str) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        load_config(None, [f"{typo}=1"])
    assert suggestion in caught.value.remedy


def test_a_colon_without_its_space_is_told() -> None:
    with pytest.raises(UnknownKeyError) as caught:
        load_config(None, ["optimizer={name:adamw, lr: 0.1}"])
    assert "name: adamw" in caught.value.remedy


@pytest.mark.parametrize(
    "word",
    ["train_micro_batch_size_per_gpu", "per_device_train_batch_size", "max_grad_norm", "activation_checkpointing"],
)
def test_another_frameworks_word_is_answered_with_ours(word: str) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        load_config({word: 8})
    assert caught.value.remedy == f"here: {FOREIGN[word]}"


def test_the_words_that_we_answer_with_exist() -> None:
    keys = set(all_keys(Config))
    for word, ours in FOREIGN.items():
        first = ours.split(" ")[0].split(":")[0].split("[")[0].rstrip(",")
        assert first in keys or first in ("nothing", "the", "name"), f"{word} -> {ours}"
        assert word not in Config.model_fields, word


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"zero": 4}, "zero.stage=3"),
    ({"zero": -1}, "zero.stage=0"),
    ({"steps": 5, "lr_schedule": {"warmup_steps": 10}}, "lr_schedule.warmup_steps=0"),
    ({"lr_schedule": "cosine"}, "steps=1000"),
    ({"lr_schedule": "cosine", "stop_after": "1h"}, "steps=1000"),
    ({"steps": 5, "tokens": 100}, "steps=5 alone"),
    ({"batch": {"global_size": 60, "micro_size": 8, "accumulation": 4}}, "batch.global_size=32"),
    ({"batch": {"global_tokens": 1000}, "data": {"sequence_length": 256}}, "batch.global_tokens=1024"),
    ({"batch": {"global_size": 4, "micro_size": 8}}, "batch.micro_size=4"),
    ({"precision": {"dtype": "bf16", "loss_scale": 1024}}, "precision.dtype=fp16"),
    ({"offload": {"parameters": "cpu"}, "zero": 2}, "zero.stage=3"),
    ({"model": {"preset": "llama-1m", "lstm": {}}}, "alone"),
    ({"model": {"preset": "llama-1m", "weights": "pretrained"}}, "model.huggingface"),
    ({"optimizer": {"name": "adamw", "momentum": 0.9}}, "remove optimizer.momentum"),
    ({"optimizer": {"betas": [0.9, 1.5]}}, "[0.9, 0.95]"),
    ({"lr_schedule": {"name": "cosine", "power": 2}, "steps": 9}, "remove lr_schedule.power"),
    ({"evaluate": {"keep_best": True}}, "evaluate.every=100"),
    ({"keep_fp32": ["*.norm"]}, "precision.dtype=bf16"),
    ({"parallel": {"pipeline_schedule": "gpipe"}}, "parallel.pipeline=2"),
    ({"parallel": {"pipeline": 2, "virtual_stages": 2}}, "parallel.virtual_stages=1"),
    ({"parallel": {"pipeline": 2, "pipeline_schedule": "zbv"}, "zero": 3}, "pipeline_schedule=1f1b"),
    ({"parallel": {"pipeline": 4}, "batch": {"global_size": 8, "accumulation": 2}}, "batch.accumulation=16"),
    ({"recompute": {"every": 2}}, "mode: full"),
    ({"lr_schedule": {"warmup_fraction": 0.1}}, "steps=1000"),
]


@pytest.mark.parametrize(("tree", "works"), CONTRADICTIONS)
def test_a_contradiction_says_got_rule_and_a_value_that_works(tree: dict[str, Any], works: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tree)
    assert caught.value.got
    assert caught.value.rule
    assert works in caught.value.remedy


def test_yaml_that_would_mislead_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in [
        ("steps: 5\nsteps: 6\n", "twice"),
        ("a: &a [1]\nb: *a\n", "alias"),
        ("- 1\n", "list"),
        ("steps: [\n", "not YAML"),
        ("1: 2\n", "key 1"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert message in caught.value.got, text
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "absent.yaml")


def test_two_sizes_settle_the_third() -> None:
    from trainwright.data.plan import plan_batches, rows_and_accumulation

    batch = load_config({"batch": {"global_size": 64, "micro_size": 8}}).config.batch
    assert rows_and_accumulation(batch, 1, 4) == (8, 2)
    assert rows_and_accumulation(batch, 1, 3) == (8, 3)  # 22 rows at most, in 3 micro-batches
    batch = load_config({"batch": {"micro_size": 8, "accumulation": 2}}).config.batch
    assert plan_batches(batch, 1, 4).global_size == 64
    batch = load_config(
        {"batch": {"global_tokens": 512, "accumulation": 2}, "data": {"sequence_length": 16}}
    ).config.batch
    assert plan_batches(batch, 16, 4).global_size == 32
    batch = load_config({"batch": {"global_size": 64, "micro_size": 8, "accumulation": 4}}).config.batch
    with pytest.raises(ContradictionError, match="data-parallel"):
        rows_and_accumulation(batch, 1, 4)


def _loads_or_is_answered(load: Callable[[], object]) -> None:
    remedies = []
    try:
        load()
    except TrainwrightError as error:
        remedies.append(error.remedy)
    assert all(remedies)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(all_keys(Config)) | st.text(max_size=10), _values, max_size=4))
def test_any_overrides_load_or_are_answered(values: dict[str, Any]) -> None:
    """Fuzz: a config either loads or raises one of our errors with a remedy; nothing else."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        node = tree
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node.setdefault(part, {}), dict) else {}
        node[last] = value
    _loads_or_is_answered(lambda: load_config(tree))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="abz.=[]{}:0-9 '\"", max_size=20), max_size=3))
def test_any_words_on_the_command_line_load_or_are_answered(words: list[str]) -> None:
    _loads_or_is_answered(lambda: load_config(None, words))
