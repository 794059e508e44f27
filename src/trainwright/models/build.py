"""From the config's `model` to a module on the meta device."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from torch import nn

from trainwright.config.model_schema import LstmModel, ModelConfig, TransformerModel
from trainwright.errors import ConfigError, ContradictionError, ModelError
from trainwright.models import pretrained
from trainwright.models.deferred import build_on_meta
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.presets import PRESETS
from trainwright.models.transformer import Transformer, TransformerSettings


def build(model: ModelConfig, vocab_size: int | None = None, seed: int = 0) -> nn.Module:
    """The model of the config, its parameters on the meta device with the recipes of their values.

    vocab_size: the tokenizer's, taken where the config does not give one; it overrides a preset's.
    Errors: ConfigError for an unknown preset, for none or several kinds of model, for missing dimensions.
    """
    kinds = [name for name in ("preset", "transformer", "lstm", "huggingface") if getattr(model, name) is not None]
    if model.weights != "random" and model.huggingface is None:
        raise ContradictionError(
            f"weights: {model.weights} with model.{kinds[0] if kinds else 'preset'}",
            "pretrained weights come with model.huggingface",
            "model: {huggingface: FOLDER, weights: pretrained}, or init_from: CHECKPOINT",
        )
    if not kinds or (len(kinds) > 1 and kinds != ["preset", "transformer"]):
        raise ConfigError(
            f"model with {' and '.join(kinds) if kinds else 'nothing'}",
            "a model is one of preset (with or without transformer), transformer, lstm, huggingface",
            "model.preset=llama-10m",
        )
    if model.huggingface is not None:
        module = pretrained.build_causal(model.huggingface, seed)
        _check_vocabulary(model.huggingface, module, vocab_size)
        return module
    if model.lstm is not None:
        lstm = lstm_settings(model.lstm, vocab_size)
        return build_on_meta(lambda: LstmLanguageModel(lstm), seed)
    transformer = transformer_settings(model.preset, model.transformer, vocab_size)
    return build_on_meta(lambda: Transformer(transformer), seed)


def is_ours(module: nn.Module) -> bool:
    """Whether the module is one of our models, whose dropout is a pure function; sharded or not."""
    return isinstance(module, Transformer | LstmLanguageModel)


def _check_vocabulary(name: str, module: Any, vocab_size: int | None) -> None:
    if vocab_size is not None and module.vocab_size < vocab_size:
        raise ModelError(
            f"{name} knows {module.vocab_size} tokens, the data set {vocab_size}",
            "the data is tokenised with the model's own tokenizer",
            f"trainwright prepare SOURCE --tokenizer {name} --out DIR",
        )


def transformer_settings(
    preset: str | None, overrides: TransformerModel | None, vocab_size: int | None = None
) -> TransformerSettings:
    """The preset's dimensions, with `vocab_size`, with the config's on top."""
    given: dict[str, Any] = {} if overrides is None else overrides.model_dump(exclude_none=True)
    if preset is None:
        return _from_dimensions(given, vocab_size)
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"model.preset {preset!r}", f"one of {', '.join(PRESETS)}", f"model.preset={near}")
    base = PRESETS[preset]
    if {"dim", "heads"} & set(given) and "head_dim" not in given:
        dim, heads = given.get("dim", base.dim), given.get("heads", base.heads)
        given["head_dim"] = _head_dim(dim, heads)
        if "heads" in given:
            given.setdefault("kv_heads", min(base.kv_heads, heads) if heads % min(base.kv_heads, heads) == 0 else heads)
    if vocab_size is not None:
        given.setdefault("vocab_size", vocab_size)
    return replace(base, **given)


def _from_dimensions(given: dict[str, Any], vocab_size: int | None) -> TransformerSettings:
    given = {**({"vocab_size": vocab_size} if vocab_size is not None else {}), **given}
    absent = [name for name in ("vocab_size", "dim", "layers", "heads") if name not in given]
    if absent:
        raise ConfigError(
            f"model.transformer without {', '.join(absent)}",
            "vocab_size (or a tokenizer), dim, layers and heads have no default",
            "model.transformer={dim: 256, layers: 6, heads: 4}, or model.preset=llama-5m",
        )
    dim, heads = given["dim"], given["heads"]
    given.setdefault("kv_heads", heads)
    if "head_dim" not in given:
        given["head_dim"] = _head_dim(dim, heads)
    # LLaMA's 8/3 D, rounded up to a multiple of 32.
    given.setdefault("ffn_dim", -(-8 * dim // (3 * 32)) * 32)
    return TransformerSettings(**given)


def _head_dim(dim: int, heads: int) -> int:
    if dim % heads:
        divisors = [count for count in range(1, heads + 1) if dim % count == 0]
        raise ConfigError(
            f"dim {dim} with heads {heads}", "heads divides dim unless head_dim is given", f"heads: {divisors[-1]}"
        )
    return dim // heads


def lstm_settings(given: LstmModel, vocab_size: int | None = None) -> LstmSettings:
    """The config's dimensions of an LSTM, with the tokenizer's vocabulary where it gives none."""
    values = given.model_dump()
    values["vocab_size"] = values["vocab_size"] or vocab_size
    if values["vocab_size"] is None:
        raise ConfigError("model.lstm without vocab_size", "a vocabulary, or a tokenizer", "model.lstm.vocab_size=8192")
    return LstmSettings(**values)


def from_config_dict(config: dict[str, Any]) -> nn.Module:
    """One of our models from its `.config`, on the meta device."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    if config.get("model_type") == "trainwright_lstm":
        lstm = LstmSettings(**values)
        return build_on_meta(lambda: LstmLanguageModel(lstm))
    known = {field.name for field in fields(TransformerSettings)}
    if config.get("model_type") != "trainwright_transformer" or set(values) - known:
        raise ConfigError(
            f"model_type {config.get('model_type')!r}",
            "trainwright_transformer or trainwright_lstm",
            "a run's own config",
        )
    transformer = TransformerSettings(**values)
    return build_on_meta(lambda: Transformer(transformer))
