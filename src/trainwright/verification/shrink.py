"""A config's own model and batch, made small enough for one process: less depth and width, the same kinds of layers."""

from __future__ import annotations

import copy
from typing import Any

from trainwright.config import Config, Resolved
from trainwright.config.model_schema import LstmModel, TransformerModel
from trainwright.errors import ConfigError
from trainwright.models import pretrained
from trainwright.models.build import transformer_settings

_HEADS = 4
_HEAD_DIM = 16
_TOKENS = 32
_ROWS = 2
_VOCABULARY = 1009
"""At most, where no data set settles it; a prime, as hard to share out as can be."""
# Hugging Face's words, of one kind each.
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_HEAD_DIMS = ("head_dim", "d_kv")


def shrink_config(resolved: Resolved) -> Resolved:
    """The config with a small model of its own kind, at most 32 tokens a row and 2 rows a micro-batch."""
    config = resolved.config
    if config.model is None:
        raise ConfigError("shrink without a model", "the config's model is made small", "model.preset=llama-10m")
    parallel = config.parallel
    depth = 2 * parallel.pipeline * (parallel.virtual_stages or 2 if parallel.pipeline > 1 else 1)
    accumulation = config.batch.accumulation or (2 * parallel.pipeline if parallel.pipeline > 1 else None)
    values: dict[str, Any] = {
        "batch": {"micro_size": _ROWS, "accumulation": accumulation},
        "data": {**config.data.model_dump(), "sequence_length": min(_TOKENS, config.data.sequence_length)},
    }
    model = config.model
    if model.lstm is not None:
        values["model"] = {"lstm": _small_lstm(model.lstm, depth).model_dump()}
    elif model.huggingface is None:
        values["model"] = {"transformer": _small_transformer(model.preset, model.transformer, depth, parallel.tensor)}
    for small in values.get("model", {}).values():
        if config.data.path is None and not config.data.mix and small["vocab_size"] is not None:
            small["vocab_size"] = min(small["vocab_size"], _VOCABULARY)
    sources = {k: v for k, v in resolved.sources.items() if not k.startswith(("batch.", "model."))}
    return Resolved(config, sources).replace("shrink", **values)


def _small_lstm(model: LstmModel, depth: int) -> LstmModel:
    small = {"layers": min(model.layers, depth), "embedding_dim": 32, "hidden_dim": 32 if model.tied else 48}
    return model.model_copy(update=small)


def _small_transformer(preset: str | None, given: TransformerModel | None, depth: int, tensor: int) -> dict[str, Any]:
    """Fewer blocks and heads; queries to a key head, normalisation, ties and dropout as they were."""
    if preset is None and given is not None and given.vocab_size is None:
        given = given.model_copy(update={"vocab_size": 1})
        whole = transformer_settings(preset, given)
        vocabulary = None
    else:
        whole = transformer_settings(preset, given)
        vocabulary = given.vocab_size if given is not None else None
        vocabulary = vocabulary or (whole.vocab_size if preset is not None else None)
    heads = max(_HEADS, 2 * tensor)
    shared = max(1, min(whole.heads // whole.kv_heads, heads // max(2, tensor)))
    small: dict[str, Any] = {
        "layers": min(whole.layers, depth),
        "heads": heads,
        "kv_heads": heads // shared,
        "head_dim": _HEAD_DIM,
        "dim": heads * _HEAD_DIM,
        "ffn_dim": 2 * heads * _HEAD_DIM,
        "vocab_size": vocabulary,
    }
    kept = ("rope_theta", "norm_eps", "qk_norm", "tied", "dropout")
    return small | {name: getattr(whole, name) for name in kept}


def shrunk_huggingface(config: Config) -> Any:
    """The small config object of a Hugging Face model, to be built with random weights; None for our own models."""
    if config.model is None or config.model.huggingface is None:
        return None
    small = copy.deepcopy(pretrained.load_config(config.model.huggingface))
    parallel = config.parallel
    text = small.get_text_config()
    heads = max(_HEADS, 2 * parallel.tensor)
    before = next((getattr(text, n) for n in _HEAD_COUNTS if isinstance(getattr(text, n, None), int)), heads)
    _set(text, _DEPTHS, 2 * parallel.pipeline * (parallel.virtual_stages or 1), only_less=True)
    _set(text, _HEAD_COUNTS, heads)
    _set(text, _WIDTHS, heads * _HEAD_DIM)
    _set(text, _INNER, 2 * heads * _HEAD_DIM)
    _set(text, _HEAD_DIMS, _HEAD_DIM)
    groups = getattr(text, "num_key_value_heads", None)
    if isinstance(groups, int):
        text.num_key_value_heads = max(2, parallel.tensor, heads * groups // before)
    if config.data.path is None and not config.data.mix:
        _set(text, ("vocab_size",), _VOCABULARY, only_less=True)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            _set(text, (name,), _VOCABULARY - 1, only_less=True)
    depth = next((getattr(text, n) for n in _DEPTHS if isinstance(getattr(text, n, None), int)), 2)
    for name, value in list(vars(text).items()):  # tables with an entry a layer
        if name in ("layer_types", "no_rope_layers") and isinstance(value, list):
            setattr(text, name, value[:depth])
    return small


def _set(config: Any, names: tuple[str, ...], value: int, only_less: bool = False) -> None:
    for name in names:
        old = getattr(config, name, None)
        if isinstance(old, int) and not isinstance(old, bool):
            setattr(config, name, min(old, value) if only_less else value)
