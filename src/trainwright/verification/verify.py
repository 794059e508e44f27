"""`verify`: does this strategy train the same model as one unsharded process? First in float64, then in its own format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trainwright import distributed
from trainwright.config import Config, Resolved, load_config
from trainwright.data.batch import Batch
from trainwright.data.mix import open_dataset
from trainwright.errors import ConfigError, TrainwrightError
from trainwright.initializing import horizon_of
from trainwright.mesh import Degrees, resolve_degrees
from trainwright.optim.schedules import build_schedule
from trainwright.startup import UserParts
from trainwright.verification.data import DatasetBatches, GivenBatches, GlobalData, plan_for, synthetic
from trainwright.verification.reference import Reference
from trainwright.verification.report import Run, Verification
from trainwright.verification.run import Setting, make_reference, reference_dtype, run_strategy
from trainwright.verification.shrink import shrink_config, shrunk_huggingface
from trainwright.verification.source import ModelSource, has_dropout, source_of, source_of_config

STEPS = 5
_STATIC_LOSS_SCALE = 1024.0

Model = nn.Module | Callable[[], nn.Module]


@dataclass
class Shared:
    """What several strategies share: references by what they depend on, and float64 proofs by their config."""

    references: dict[Any, Reference] = field(default_factory=dict)
    proofs: dict[Any, Run] = field(default_factory=dict)
    sources: dict[Any, ModelSource] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A model, its config and its data, ready to be verified."""

    name: str
    resolved: Resolved
    source: ModelSource
    data: GlobalData
    user: UserParts = field(default_factory=UserParts)
    key: Any = None
    """What the reference depends on, where several subjects share it; None: it is not shared."""
    exact_first: bool = True
    """The proof in float64 before the config's own format."""


def verify(
    model: Model | None = None,
    config: str | Path | Mapping[str, Any] | Config | Resolved | None = None,
    *,
    steps: int = STEPS,
    data: Sequence[Batch] | None = None,
    shrink: bool = False,
    shard_units: Sequence[str | type[nn.Module]] | None = None,
    tensor_plan: Mapping[str, str] | None = None,
    pipeline_plan: Sequence[str] | None = None,
) -> Verification:
    """Trains `steps` steps under the config's strategy and in one unsharded process, and compares. Collective.

    Args:
        model: a module (left as it is), or a callable that builds one; None takes the config's `model`.
        config: as for `initialize`.
        steps: optimizer steps.
        data: a global batch for each step (the same on every rank); by default those of the config's `data.path`,
            without one random tokens with 40% of the labels and a whole row masked.
        shrink: the config's model and batch, made small (its depth, width, rows and tokens), so that they fit one process.
        shard_units, tensor_plan, pipeline_plan: as for `initialize`.

    Returns the figures; `.ok` says whether all of them are within the tolerances. Raises ConfigError, ModelError or
    UsageError where the strategy refuses the model.
    """
    resolved = load_config(config)
    if resolved.config.compile == "auto":  # what is to be proved is the strategy; compile=true proves that as well
        resolved = resolved.replace("verify", compile=False)
    huggingface = None
    if shrink:
        if model is not None:
            raise ConfigError(
                "shrink=True with a model from Python",
                "only the dimensions of the config's own model are known",
                "a smaller model in the call",
            )
        huggingface = shrunk_huggingface(resolved.config)
        resolved = shrink_config(resolved)
    user = UserParts(shard_units=shard_units, tensor_plan=tensor_plan, pipeline_plan=pipeline_plan)
    distributed.start(resolved.config.parallel.backend)
    subject = subject_of(model, resolved, steps, data, user, huggingface)
    found = verify_subject(subject, refusals=False)
    if data is None and resolved.config.data.path is None and not resolved.config.data.mix:
        found.notes.append("random tokens (data.path is not set)")
    return found


def subject_of(
    model: Model | None,
    resolved: Resolved,
    steps: int,
    batches: Sequence[Batch] | None,
    user: UserParts,
    huggingface: object | None = None,
) -> Subject:
    """Model and data of a config, or of a Python caller."""
    config = resolved.config
    dataset = open_dataset(config.data) if config.data.path or config.data.mix else None
    if model is not None:
        source = source_of(model, config.seed)
    elif config.model is not None:
        source = source_of_config(config, dataset.vocab_size if dataset is not None else None, huggingface)
    else:
        raise ConfigError(
            "model is not set", "there is a model to verify", "model.preset=llama-1m, or tw.verify(model)"
        )
    degrees = _degrees(config)
    size = plan_for(config, degrees.replicate * degrees.shard).global_size
    data: GlobalData
    if batches is not None:
        data = GivenBatches(list(batches)[:steps])
    elif dataset is not None:
        data = DatasetBatches(config, size, steps)
    else:
        data = synthetic(
            source.vocab_size(), size, config.data.sequence_length, steps, config.seed, config.data.document_mask
        )
    return Subject("strategy", resolved, source, data, user)


def verify_subject(subject: Subject, shared: Shared | None = None, refusals: bool = True) -> Verification:
    """One strategy. Collective. `refusals`: a refusal by name becomes the result instead of an error."""
    began, shared = time.perf_counter(), shared or Shared()
    found = Verification(subject.name, strategy_text(subject.resolved.config))
    dtype = subject.resolved.config.precision.dtype
    formats = ["fp64", dtype] if subject.exact_first and dtype != "fp64" else [dtype]
    try:
        for one in formats:
            found.runs.append(_run(subject, one, shared))
            if not found.runs[-1].ok:
                break
    except TrainwrightError as error:
        if not refusals:
            raise
        found.status, found.reason = "refused", refusal(error)
    problems = found.problems
    if problems and found.status != "refused":
        found.status, found.reason = "failed", problems[0].what
    found.notes += _notes(subject)
    found.time_s = time.perf_counter() - began
    return found


def refusal(error: TrainwrightError) -> str:
    """What a refused row says."""
    return f"{type(error).__name__}: {error.got}; {error.rule}; works: {error.remedy}"


def _run(subject: Subject, dtype: str, shared: Shared) -> Run:
    resolved = in_format(subject.resolved, dtype)
    key = (subject.key, resolved.config.model_dump_json())
    if dtype != "fp64" or subject.key is None:
        return run_strategy(_setting(subject, resolved, shared))
    if key not in shared.proofs:
        shared.proofs[key] = run_strategy(_setting(subject, resolved, shared))
    return shared.proofs[key]


def _setting(subject: Subject, resolved: Resolved, shared: Shared) -> Setting:
    config = resolved.config
    device = distributed.start(config.parallel.backend).device
    horizon = _horizon(resolved)
    dtype = reference_dtype(config.precision.dtype)
    schedule = build_schedule(config.lr_schedule, horizon)
    if subject.key is None:
        reference = make_reference(subject.source, resolved, dtype, device, schedule, subject.data)
    else:
        key = (subject.key, dtype)
        if key not in shared.references:
            made = make_reference(subject.source, resolved, dtype, device, schedule, subject.data, keep=True)
            shared.references[key] = made
        reference = shared.references[key]
    degrees = _degrees(config)
    plan = plan_for(config, degrees.replicate * degrees.shard)
    return Setting(resolved, subject.source, subject.data, plan, reference, dtype, subject.user, horizon)


def in_format(resolved: Resolved, dtype: str) -> Resolved:
    """The config with everything in `dtype`; unchanged where that is its own (fp16: a static scale, so that no step is
    skipped while the scale is being found)."""
    precision = resolved.config.precision
    if dtype == precision.dtype:
        if dtype == "fp16" and not isinstance(precision.loss_scale, float):
            return resolved.replace("verify", precision__loss_scale=_STATIC_LOSS_SCALE)
        return resolved
    changes: dict[str, Any] = {"precision": {"dtype": dtype}, "keep_fp32": (), "optimizer__moments": None}
    sources = {
        k: v for k, v in resolved.sources.items() if not k.startswith(("precision.", "keep_fp32", "optimizer.moments"))
    }
    return Resolved(resolved.config, sources).replace("verify", **changes)


def strategy_text(config: Config) -> str:
    """Such as `zero 2, tensor 2, accumulation 3, bf16`."""
    parallel = config.parallel
    words = [f"zero {config.zero.stage}"]
    words += [f"{a} {n}" for a in ("tensor", "context", "pipeline", "replicate") if (n := getattr(parallel, a)) > 1]
    if parallel.pipeline > 1:
        words.append(parallel.pipeline_schedule)
    if config.batch.accumulation is not None:
        words.append(f"accumulation {config.batch.accumulation}")
    if config.recompute.mode != "none":
        words.append(f"recompute {config.recompute.mode}")
    return ", ".join([*words, config.precision.dtype])


def _degrees(config: Config) -> Degrees:
    world = distributed.start(config.parallel.backend)
    return resolve_degrees(config.parallel, config.zero.stage, world.size)


def _horizon(resolved: Resolved) -> int | None:
    """The run's horizon; for epochs and durations, which only a training run can turn into steps, a thousand."""
    if resolved.config.epochs is not None or resolved.config.duration is not None:
        return 1000
    return horizon_of(resolved)


def _notes(subject: Subject) -> list[str]:
    notes = []
    if not subject.source.ours and any(has_dropout(m) for m in subject.source.build().modules()):
        notes.append("dropout is off: this model draws it by rank, which one process cannot draw again")
    if subject.resolved.config.optimizer.name.lower() in ("lion", "muon", "torch.optim.rprop"):
        notes.append("gradients only: the optimizer takes signs, each step starts from the strategy's own weights")
    return notes
