"""An engine's whole state as checkpoint content, and back: weights, optimizer, schedule, scaler, average, counters.

No random state: dropout and the order of the data are pure functions of numbers that are saved here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.checkpoint.load import load, load_weights
from trainwright.checkpoint.save import CheckpointContent
from trainwright.errors import CheckpointError

if TYPE_CHECKING:
    from trainwright.engine import Engine


def content_of(engine: Engine, state: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> CheckpointContent:
    """What `engine.save` writes; `state` is the caller's, JSON, and so are `tensors`, under names of their own."""
    parts = engine.parts
    update = parts.update
    scalars: dict[str, Any] = {
        "step": engine.global_step,
        "tokens": engine.tokens_seen,
        "optimizer": {"class": _class_name(update.optimizer.optimizer), **update.optimizer.scalars()},
        "lr_schedule": update.lr.state(),
        "loss_scaler": update.scaler.state(),
        "skipped": update.skipped,
        "skipped_in_a_row": update.skipped_in_a_row,
        "last_norm": update.last_norm,
        "nominal_tokens": engine.nominal_tokens,
        "ema_updates": update.ema.updates if update.ema is not None else None,
        "world_size": dist.get_world_size(),
        "zero_stage": parts.config.config.zero.stage,
        "config": parts.config.config.model_dump(mode="json"),
        "state": state,
    }
    return CheckpointContent({**_tensors(engine), **(tensors or {})}, scalars, parts.model.aliases_for_checkpoint())


def _tensors(engine: Engine) -> dict[str, Tensor]:
    update = engine.parts.update
    masters = update.optimizer.masters()
    tensors = {f"model.{name}": masters.get(name, tensor) for name, tensor in engine.parts.model.state()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in update.optimizer.state().items()}
    if update.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in update.ema.state().items()}
    return tensors


def restore(engine: Engine, path: str | Path, verified: bool = False) -> dict[str, Any]:
    """Fills the engine from a checkpoint of any world size and strategy; returns the caller's state. Collective."""
    update = engine.parts.update
    update.optimizer.materialise_state()
    engine.parts.model.end_step()
    tensors = _tensors(engine)
    manifest = load_weights(path, {k: v for k, v in tensors.items() if k.startswith("model.")})
    update.optimizer.weights_loaded()
    scalars: dict[str, Any] = dict(manifest.scalars)
    own, saved = _class_name(update.optimizer.optimizer), scalars["optimizer"]["class"]
    if own != saved:
        raise CheckpointError(
            f"{path} holds the state of {saved}, the run has {own}",
            "a run goes on with the optimizer that it began with",
            f"optimizer.name of the checkpoint ({saved}), or init_from={path} to take the weights alone",
        )
    rest = {k: v for k, v in tensors.items() if not k.startswith("model.") and k in manifest.tensors}
    # Sgd without momentum keeps no state, nor does an optimizer before its first step. The manifest decides, the same on
    # all ranks: a pipeline part that is frozen whole has nothing to ask for.
    if any(not name.startswith("model.") for name in manifest.tensors):
        load(path, rest, strict=False, verified=True)
    update.optimizer.load_state(_without_prefix(rest, "optimizer."))
    update.optimizer.load_scalars({k: v for k, v in scalars["optimizer"].items() if k != "class"})
    if update.ema is not None:
        update.ema.load_state(_without_prefix(rest, "ema."), int(scalars["ema_updates"] or 0))
    update.lr.load_state(scalars["lr_schedule"])
    update.scaler.load_state(scalars["loss_scaler"])
    update.skipped = int(scalars["skipped"])
    update.skipped_in_a_row = int(scalars["skipped_in_a_row"])
    update.last_norm = scalars.get("last_norm")
    engine.resume_at(int(scalars["step"]), int(scalars["tokens"]), scalars["nominal_tokens"])
    return dict(scalars["state"])


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    kind = type(optimizer)
    if saved_as := getattr(optimizer, "saved_as", None):
        return str(saved_as)
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
