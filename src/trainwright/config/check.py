"""Contradictions between values: got, rule, and a value that works."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

from trainwright import storage
from trainwright.config.check_outer import check_outer
from trainwright.config.check_strategy import STRATEGY_RULES
from trainwright.config.schema import Config
from trainwright.errors import ConfigError, ContradictionError

# key: (the key that decides, its values under which the option acts)
_ACTS_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "lr_schedule.decay_fraction": ("lr_schedule.name", ("wsd",)),
    "lr_schedule.power": ("lr_schedule.name", ("polynomial",)),
    "lr_schedule.final_fraction": ("lr_schedule.name", ("linear", "cosine", "wsd", "one_cycle", "polynomial")),
    "precision.loss_scale": ("precision.dtype", ("fp16",)),
    "precision.max_skipped_steps": ("precision.dtype", ("fp16", "bf16", "fp32", "fp64")),
    "optimizer.adamw_lr": ("optimizer.name", ("muon",)),
}
_OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    # named optimizer: keys that it does not have
    "adamw": ("momentum", "nesterov", "options"),
    "adam": ("momentum", "nesterov", "options"),
    "lion": ("momentum", "nesterov", "eps", "options"),
    "sgd": ("betas", "eps", "options"),
}


def check(config: Config, given: Set[str]) -> None:
    """Raises ContradictionError (or ConfigError) for the first combination that cannot hold. `given`: dotted keys set."""
    for rule in _RULES:
        rule(config, given)


def _model(config: Config, given: Set[str]) -> None:
    model = config.model
    if model is None:
        return
    kinds = [k for k in ("lstm", "huggingface") if getattr(model, k) is not None]
    if model.preset is not None or model.transformer is not None:
        kinds.append("preset" if model.preset is not None else "transformer")
    if len(kinds) != 1:
        raise ContradictionError(
            f"model with {' and '.join(kinds) or 'nothing'} set",
            "a model is one of preset (with transformer's keys over it), transformer, lstm, huggingface",
            f"model.{kinds[0] if kinds else 'preset'} alone, such as model.preset=llama-10m",
        )
    if model.weights == "pretrained" and model.huggingface is None:
        raise ContradictionError(
            "model.weights=pretrained without model.huggingface",
            "pretrained weights are those of a Hugging Face model",
            "model.huggingface=FOLDER, or init_from=CHECKPOINT for weights trained here",
        )


def _horizon(config: Config, given: Set[str]) -> None:
    horizons = [k for k in ("steps", "tokens", "epochs", "duration") if getattr(config, k) is not None]
    if len(horizons) > 1:
        raise ContradictionError(
            f"{' and '.join(f'{k}={getattr(config, k)}' for k in horizons)}",
            "a run has one horizon: steps, tokens, epochs or duration",
            f"{horizons[0]}={getattr(config, horizons[0])} alone (stop_after limits a launch)",
        )
    schedule = config.lr_schedule
    if schedule.name != "constant" and not horizons and given:
        raise ContradictionError(
            f"lr_schedule.name={schedule.name} without a horizon",
            "a schedule with an end needs to know where it is; stop_after only limits a launch",
            "steps=1000 (or tokens, epochs, duration), or lr_schedule.name=constant",
        )
    if "lr_schedule.warmup_steps" in given and schedule.warmup_fraction is not None and schedule.warmup_steps:
        raise ContradictionError(
            f"lr_schedule.warmup_steps={schedule.warmup_steps} and warmup_fraction={schedule.warmup_fraction}",
            "the warm-up is given in steps or as a share of the horizon",
            f"lr_schedule.warmup_steps={schedule.warmup_steps} alone",
        )
    if schedule.warmup_fraction and not horizons:
        raise ContradictionError(
            f"lr_schedule.warmup_fraction={schedule.warmup_fraction} without a horizon",
            "a share needs a whole",
            "lr_schedule.warmup_steps=100, or steps=1000",
        )
    if config.steps is not None and schedule.warmup_steps >= config.steps and schedule.warmup_steps > 0:
        raise ContradictionError(
            f"lr_schedule.warmup_steps={schedule.warmup_steps} in a run of steps={config.steps}",
            "the warm-up is shorter than the run",
            f"lr_schedule.warmup_steps={config.steps // 10}",
        )


def _batch(config: Config, given: Set[str]) -> None:
    batch, length = config.batch, config.data.sequence_length
    if batch.global_tokens is not None:
        if batch.global_size is not None and batch.global_size * length != batch.global_tokens:
            raise ContradictionError(
                f"batch.global_size={batch.global_size} and batch.global_tokens={batch.global_tokens}",
                "the global batch is given in sequences or in tokens",
                f"batch.global_size={batch.global_size} alone",
            )
        if batch.global_tokens % length:
            raise ContradictionError(
                f"batch.global_tokens={batch.global_tokens} with data.sequence_length={length}",
                "a global batch is whole sequences",
                f"batch.global_tokens={max(1, round(batch.global_tokens / length)) * length}",
            )
    sequences = batch.global_size or (batch.global_tokens // length if batch.global_tokens else None)
    if sequences is not None and batch.micro_size is not None and batch.micro_size > sequences:
        raise ContradictionError(
            f"batch.micro_size={batch.micro_size} of a global batch of {sequences} sequences",
            "a micro-batch is a part of the global batch",
            f"batch.micro_size={sequences}",
        )
    if sequences is not None and batch.accumulation is not None and batch.accumulation > sequences:
        raise ContradictionError(
            f"batch.accumulation={batch.accumulation} of a global batch of {sequences} sequences",
            "each micro-batch holds a sequence at least",
            f"batch.accumulation={sequences}",
        )
    if sequences is not None and batch.micro_size is not None and batch.accumulation is not None:
        per_rank = batch.micro_size * batch.accumulation
        if sequences % per_rank:
            raise ContradictionError(
                f"batch.global_size={sequences}, micro_size={batch.micro_size}, accumulation={batch.accumulation}",
                "global_size = micro_size x accumulation x data-parallel ranks; any two settle the third",
                f"leave accumulation out, or batch.global_size={max(1, sequences // per_rank) * per_rank}",
            )


def _options_that_act(config: Config, given: Set[str]) -> None:
    values = {
        "lr_schedule.name": config.lr_schedule.name,
        "precision.dtype": config.precision.dtype,
        "optimizer.name": config.optimizer.name.lower(),
    }
    for key, (decider, allowed) in _ACTS_ONLY_WITH.items():
        section, _, name = key.partition(".")
        is_set = getattr(getattr(config, section), name) != type(getattr(config, section)).model_fields[name].default
        if (key in given or any(k.startswith(key + ".") for k in given)) and is_set and values[decider] not in allowed:
            raise ContradictionError(
                f"{key} with {decider}={values[decider]}",
                f"{key} acts only with {decider}={' or '.join(allowed)}",
                f"remove {key}, or {decider}={allowed[0]}",
            )
    absent = _OPTIMIZER_KEYS.get(values["optimizer.name"], ())
    for name in absent:
        value = getattr(config.optimizer, name)
        if value is not None and value != {}:
            raise ContradictionError(
                f"optimizer.{name}={value} with optimizer.name={config.optimizer.name}",
                f"{config.optimizer.name} has no {name}",
                f"remove optimizer.{name}",
            )
    if config.optimizer.betas is not None and not all(0 <= b < 1 for b in config.optimizer.betas):
        raise ConfigError(
            f"optimizer.betas={config.optimizer.betas}", "each is in [0, 1)", "optimizer.betas=[0.9, 0.95]"
        )
    if config.evaluate.keep_best and config.evaluate.every == 0:
        raise ContradictionError(
            "evaluate.keep_best=true with evaluate.every=0",
            "the best is found among evaluations during training",
            "evaluate.every=100",
        )


def _data(config: Config, given: Set[str]) -> None:
    data = config.data
    if data.path is not None and data.mix:
        raise ContradictionError(
            f"data.path={data.path} and data.mix of {len(data.mix)} sets",
            "the data is one set, or a mix",
            "data.path alone, or every set in data.mix",
        )
    given_weights = [entry.weight for entry in data.mix if entry.weight is not None]
    if given_weights and len(given_weights) < len(data.mix):
        raise ContradictionError(
            f"data.mix with a weight for {len(given_weights)} of {len(data.mix)} sets",
            "all sets have a weight, or none (then the sets' sizes are the weights)",
            f"data.mix: [{{path: {data.mix[0].path}, weight: 0.5}}, ...]",
        )


def _precision(config: Config, given: Set[str]) -> None:
    precision = config.precision
    scale = precision.loss_scale
    if isinstance(scale, float) and scale <= 0:
        raise ConfigError(f"precision.loss_scale={scale}", "a loss scale is positive", "precision.loss_scale=1024")
    if precision.reduce_dtype == "fp64" and precision.dtype != "fp64":
        raise ContradictionError(
            f"precision.reduce_dtype=fp64 with precision.dtype={precision.dtype}",
            "masters are fp32; a wider sum would be rounded back at once",
            "precision.reduce_dtype=fp32",
        )
    if precision.dtype == "fp64" and precision.reduce_dtype not in (None, "fp64"):
        raise ContradictionError(
            f"precision.reduce_dtype={precision.reduce_dtype} with precision.dtype=fp64",
            "fp64 is for proofs: everything is fp64",
            "remove precision.reduce_dtype",
        )
    adam = config.optimizer.name.lower() in ("adamw", "adam")
    if config.optimizer.moments is not None and (not adam or precision.dtype == "fp64"):
        what = f"optimizer.name={config.optimizer.name}" if not adam else "precision.dtype=fp64"
        raise ContradictionError(
            f"optimizer.moments={config.optimizer.moments} with {what}",
            "the format of moments is chosen for adamw and adam, beside masters in fp32 or bf16",
            "optimizer.name=adamw with precision=bf16, or remove optimizer.moments",
        )
    if precision.master != "fp32":
        _bf16_masters(config, adam)
    if config.keep_fp32 and precision.dtype in ("fp32", "fp64"):
        raise ContradictionError(
            f"keep_fp32={list(config.keep_fp32)} with precision.dtype={precision.dtype}",
            "modules can be kept in fp32 only where the others compute in less",
            "remove keep_fp32, or precision.dtype=bf16",
        )


def _bf16_masters(config: Config, adam: bool) -> None:
    master = f"precision.master={config.precision.master}"
    for wrong, what, rule, remedy in (
        (config.precision.dtype != "bf16", f"precision.dtype={config.precision.dtype}", "masters in bf16 are the weights "
         "that forward and backward compute with", "precision.dtype=bf16, or precision.master=fp32"),
        (not adam, f"optimizer.name={config.optimizer.name}", "an update smaller than bf16's last place must be rounded "
         "on purpose, which adamw and adam do here", "optimizer.name=adamw, or precision.master=fp32"),
        (config.ema is not None, f"ema={config.ema}", "an average of bf16 weights in bf16 stands still",
         "remove ema, or precision.master=fp32"),
        (bool(config.keep_fp32), f"keep_fp32={list(config.keep_fp32)}", "these modules' masters would be bf16 too",
         "remove keep_fp32, or precision.master=fp32"),
    ):  # fmt: skip
        if wrong:
            raise ContradictionError(f"{master} with {what}", rule, remedy)


_RULES: tuple[Callable[[Config, Set[str]], None], ...] = (
    *STRATEGY_RULES,
    _model,
    _data,
    _horizon,
    _batch,
    _precision,
    _options_that_act,
    check_outer,
)


def check_trainable(config: Config) -> None:
    """What `trainwright train` needs beyond a valid config. Raises ConfigError."""
    if config.data.path is None and not config.data.mix:
        raise ConfigError(
            "data.path is not set",
            "training needs a token data set",
            "data.path=FOLDER, as `trainwright prepare SOURCE --out FOLDER` writes it",
        )
    for path in [config.data.path] if config.data.path else [entry.path for entry in config.data.mix]:
        if not storage.is_url(path) and not (Path(path).expanduser() / "manifest.json").is_file():
            raise ConfigError(
                f"{'data.path' if config.data.path else 'path in data.mix'}={path} holds no manifest.json",
                "a token data set is a folder that `trainwright prepare` has finished",
                f"trainwright prepare SOURCE --out {path}",
            )
    if config.model is None:
        raise ConfigError("model is not set", "training needs a model", "model.preset=llama-10m")
    if all(v is None for v in (config.steps, config.tokens, config.epochs, config.duration, config.stop_after)):
        raise ConfigError(
            "a run without an end",
            "a run has a horizon, or stop_after",
            "steps=1000, tokens=1e9, epochs=1 or duration=3m",
        )
