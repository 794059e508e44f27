"""From a config to the planner's job: the model's shape, the batch, and what the config has settled already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainwright.config import Resolved
from trainwright.errors import ConfigError
from trainwright.models import pretrained
from trainwright.models.build import transformer_settings
from trainwright.planner.job import Cluster, Job
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
    if precision == "fp8" and cluster.device.tflops_8bit is None:
        raise ConfigError(
            f"float8 on {cluster.device.name}", "float8 products need a device with such units", "precision.float8=none"
        )
    parallel = config.parallel
    moved = [key for key in ("offload.optimizer", "offload.parameters") if setting(config, key) != "none"]
    if moved and config.optimizer.name.lower() == "muon":
        raise ConfigError(
            f"a plan with {moved[0]}={setting(config, moved[0])} and optimizer.name=muon",
            "Muon gathers whole matrices where the ranks talk: what it keeps stays on the devices",
            f"{moved[0]}=none, or optimizer.name=adamw",
        )
    on_disk = [key for key in ("offload.optimizer", "offload.parameters") if setting(config, key) == "disk"]
    if on_disk:
        raise ConfigError(
            f"a plan with {on_disk[0]}=disk",
            "how fast the disk is the catalogue does not know",
            f"leave {on_disk[0]} out, or plan --dry-run with the strategy that you have in mind",
        )
    fixed = {name: setting(config, key) for key, name in _SETTLED.items() if resolved.was_set(key)}
    if any(resolved.was_set(key) for key in ("offload.optimizer", "offload.parameters")):
        offload = config.offload
        fixed["offload"] = (
            "parameters" if offload.parameters != "none" else "optimizer" if offload.optimizer != "none" else "none"
        )
    return Job(
        shape=shape_of(resolved, vocab_size),
        cluster=cluster,
        sequence_length=length,
        global_batch=batch,
        precision=precision,
        compiled=config.compile is not False,
        parts_backwards=config.compile is not True,
        fused_update=config.fused.optimizer_in_backward,
        offloads=config.optimizer.name.lower() != "muon",
        masters=config.precision.master,
        moments=config.optimizer.moments or ("fp32" if config.precision.master == "fp32" else "bf16"),
        reduce_bytes=2 if config.precision.reduce_dtype in ("bf16", "fp16") else 4,
        sequence_parallel=parallel.sequence and config.model is not None and config.model.huggingface is None,
        schedule=parallel.pipeline_schedule if resolved.was_set("parallel.pipeline_schedule") else None,
        most_tensor=_most_tensor(resolved),
        notes=tuple(_not_counted(resolved, cluster)),
        fixed=fixed,
    )


def _most_tensor(resolved: Resolved) -> int:
    name = resolved.config.model.huggingface if resolved.config.model is not None else None
    if name is None:
        return 1 << 30
    return 1 << 30 if getattr(pretrained.load_config(name), "base_model_tp_plan", None) else 1


def _not_counted(resolved: Resolved, cluster: Cluster) -> Iterator[str]:
    config = resolved.config
    if config.optimizer.name.lower() not in ("adamw", "adam"):
        yield f"optimizer.name={config.optimizer.name}: reckoned as AdamW, with two fp32 moments"
    if config.optimizer.moments in ("bf16", "8bit"):
        yield f"optimizer.moments={config.optimizer.moments}: the update's time is reckoned as fp32's"
    if config.recompute.every != 1:
        yield f"recompute.every={config.recompute.every}: reckoned as every block"
    if cluster.device.name.startswith("V100") and config.precision.dtype != "fp16":
        yield f"{cluster.device.name} multiplies fp16 alone at the rate that is reckoned with"
    if config.precision.dtype == "fp32":
        yield "fp32 is reckoned as TF32"


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


_GATED = frozenset(
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "phi3",
        "olmo",
        "olmo2",
        "smollm3",
        "granite",
        "cohere",
        "glm",
        "stablelm",
        "internlm2",
        "helium",
    ]
)
_PLAIN = frozenset(["gpt2", "opt", "gpt_neox", "phi", "starcoder2", "gptj", "codegen", "bloom"])


def _huggingface(name: str) -> ModelShape:
    config: Any = pretrained.load_config(name)
    if config.model_type not in _GATED | _PLAIN:
        raise ConfigError(
            f"a plan for {name}, a model of type {config.model_type}",
            f"the planner knows dense decoders: {', '.join(sorted(_GATED | _PLAIN))}",
            "plan --dry-run reckons one strategy of any model",
        )

    def first(*names: str) -> Any:
        return next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)

    dim, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    return ModelShape(
        layers=first("num_hidden_layers", "n_layer"),
        dim=dim,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        ffn_dim=first("intermediate_size", "ffn_dim", "n_inner") or 4 * dim,
        vocab_size=config.vocab_size,
        gated=config.model_type in _GATED,
        tied=bool(config.tie_word_embeddings),
        head_size=first("head_dim"),
    )


def setting(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config
