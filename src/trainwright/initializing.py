"""`initialize`: an engine for a loop of one's own, from a model and a config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trainwright.config import Config, Resolved, load_config
from trainwright.engine import Engine
from trainwright.errors import ConfigError
from trainwright.model_source import Model
from trainwright.planner.at_start import strategy_for
from trainwright.startup import UserOptimizer, UserParts, UserSchedule, build_engine


def initialize(
    *,
    model: Model,
    config: str | Path | Mapping[str, Any] | Config | Resolved | None = None,
    optimizer: UserOptimizer | None = None,
    lr_schedule: UserSchedule | None = None,
    tensor_plan: Mapping[str, str] | None = None,
    pipeline_plan: Sequence[str] | None = None,
    shard_units: Sequence[str | type[nn.Module]] | None = None,
) -> Engine:
    """An engine that trains `model` as `config` says. Collective: every rank calls it.

    Args:
        model: a module, or a callable that builds one: it is built without storage for its parameters, and each rank
            then fills only its shards, with the same initial values at any world size. A module that comes with
            values gets rank 0's on every rank.
        config: a YAML file's path, a dict or a `Config`.
        optimizer: an instance over the model's parameters, or a callable from the list of parameters (this rank's
            shards) to an optimizer; else the config's.
        lr_schedule: a function from the step to a factor on the learning rate, or a torch LRScheduler of `optimizer`.
        tensor_plan: module name pattern -> style (colwise, rowwise ...), instead of the model's own
            `base_model_tp_plan`; used with parallel.tensor > 1.
        pipeline_plan: names of the modules that a forward passes through one after another (lists of blocks are cut
            between their members), instead of the model's own `_pp_plan`; used with parallel.pipeline > 1.
        shard_units: classes, class names or name patterns of the modules that are gathered together.

    Works with no launcher (one process), under torchrun, mpirun and srun. Raises ConfigError, ModelError or
    LaunchError before anything is trained.
    """
    resolved = load_config(config)
    for axis, plan in (("tensor", tensor_plan), ("pipeline", pipeline_plan)):
        if plan is not None and getattr(resolved.config.parallel, axis) == 1:
            raise ConfigError(
                f"{axis}_plan is given with parallel.{axis}=1",
                f"the plan says how {axis} parallelism cuts the model",
                f"parallel.{axis}=2, or leave {axis}_plan out",
            )
    if lr_schedule is not None and any(
        resolved.was_set(f"lr_schedule.{key}") for key in type(resolved.config.lr_schedule).model_fields
    ):
        raise ConfigError(
            "an lr_schedule in the config and lr_schedule= in the call",
            "one of them decides",
            "leave `lr_schedule` out of the config",
        )
    _warn_of_idle_sections(resolved)
    if resolved.config.strategy == "auto":
        given = {"tensor_plan": tensor_plan, "pipeline_plan": pipeline_plan, "shard_units": shard_units}
        if brought := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"strategy=auto with {', '.join(brought)} in the call",
                "a strategy is tried on the model as it comes",
                "strategy=manual, or leave them out",
            )
        resolved = strategy_for(model, resolved)
    user = UserParts(optimizer, lr_schedule, shard_units, tensor_plan=tensor_plan, pipeline_plan=pipeline_plan)
    return build_engine(model, resolved, user, horizon_of(resolved))


def _warn_of_idle_sections(resolved: Resolved) -> None:
    """Sections for the loop of `trainwright train`, which does not run here."""
    for_the_loop = ("evaluate.", "checkpoint.", "track", "stop_after", "run_dir", "outer.")
    idle = sorted(key for key in resolved.sources if key.startswith(for_the_loop) and resolved.was_set(key))
    if idle:
        warnings.warn(f"with a training loop of your own these keys do nothing: {', '.join(idle)}", stacklevel=3)


def horizon_of(resolved: Resolved) -> int | None:
    """Optimizer steps of the run, where the config alone tells them. Raises ConfigError for epochs and duration."""
    config = resolved.config
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        length = config.data.sequence_length
        size = config.batch.global_size or (config.batch.global_tokens or 0) // length
        if not size:
            raise ConfigError("tokens without a global batch", "steps = tokens / tokens a step", "batch.global_size=64")
        return -(-config.tokens // (size * length))
    for name in ("epochs", "duration"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name}={getattr(config, name)} with a training loop of your own",
                f"{name} needs the data and the loop of `trainwright train`",
                "steps=1000, or tokens=1e9",
            )
    return None
