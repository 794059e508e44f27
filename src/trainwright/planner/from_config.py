"""From a config to the planner's job: the model's shape, the batch, and what the config has settled already."""

from __future__ import annotations

from typing import Any

from trainwright.config import Resolved
from trainwright.errors import ConfigError
from trainwright.models import pretrained
from trainwright.models.build import transformer_settings
from trainwright.planner.search import Cluster, Job
from trainwright.planner.workload import ModelShape, Precision

_SETTLED = {
    "zero.stage": "zero",
    "parallel.tensor": "tensor",
    "parallel.pipeline": "pipeline",
    "parallel.context": "context",
    "parallel.replicate": "replicate",
    "parallel.virtual_stages": "interleave",
    "batch.micro_size": "micro_batch",
    "batch.accumulation": "micro_batches",
    "recompute.mode": "recompute",
}


def job_of(resolved: Resolved, cluster: Cluster, vocab_size: int | None = None) -> Job:
    """What `plan` searches for. vocab_size: the data set's, where there is one.

    Raises ConfigError for a config without a model or a batch, and for models that are not decoders of one kind of block.
    """
    config = resolved.config
    length = config.data.sequence_length
    batch = config.batch.global_size or (config.batch.global_tokens or 0) // length
    if not batch:
        raise ConfigError(
            "a plan without a global batch",
            "what is planned is the time of an optimizer step of so many sequences, on any number of ranks",
            "batch.global_size=256, or batch.global_tokens=1e6",
        )
    precision: Precision = "fp8" if config.precision.float8 != "none" else config.precision.dtype  # type: ignore[assignment]
    if precision not in ("fp32", "fp16", "bf16", "fp8"):
        raise ConfigError(f"a plan in {precision}", "the planner knows fp32, fp16, bf16 and float8", "precision=bf16")
    return Job(
        shape=shape_of(resolved, vocab_size),
        cluster=cluster,
        sequence_length=length,
        global_batch=batch,
        precision=precision,
        compiled=config.compile is not False,
        fixed={name: _at(config, key) for key, name in _SETTLED.items() if resolved.was_set(key)},
    )


def shape_of(resolved: Resolved, vocab_size: int | None = None) -> ModelShape:
    """The model's shape, from the config alone: no module is built."""
    model = resolved.config.model
    if model is None:
        raise ConfigError("a plan without a model", "its shape decides", "model.preset=llama-8b")
    if model.lstm is not None:
        raise ConfigError(
            "a plan for an LSTM",
            "the planner knows decoders of attention and feed-forward",
            "plan --dry-run reckons it",
        )
    if model.huggingface is not None:
        return _huggingface(model.huggingface)
    s = transformer_settings(model.preset, model.transformer, vocab_size)
    return ModelShape(
        layers=s.layers,
        dim=s.dim,
        heads=s.heads,
        kv_heads=s.kv_heads,
        ffn_dim=s.ffn_dim,
        vocab_size=s.vocab_size,
        gated=True,
        tied=s.tied,
        head_size=s.head_dim,
        qk_norm=s.qk_norm,
    )


def _huggingface(name: str) -> ModelShape:
    config: Any = pretrained.load_config(name)
    get = lambda *names: next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)  # noqa: E731
    layers, dim = get("num_hidden_layers", "n_layer"), get("hidden_size", "n_embd")
    heads = get("num_attention_heads", "n_head")
    if layers is None or dim is None or heads is None or get("num_experts", "num_local_experts", "n_routed_experts"):
        raise ConfigError(
            f"a plan for {name} ({type(config).__name__})",
            "the planner knows dense decoders of attention and feed-forward",
            "plan --dry-run reckons one strategy of any model",
        )
    return ModelShape(
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=get("num_key_value_heads") or heads,
        ffn_dim=get("intermediate_size", "n_inner") or 4 * dim,
        vocab_size=config.vocab_size,
        gated=get("n_embd") is None,  # GPT-2's words mean GPT-2's block
        tied=bool(config.tie_word_embeddings),
        head_size=get("head_dim"),
    )


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config
