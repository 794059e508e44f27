"""The optimizer, out of the config or out of the user's hands, over local shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainwright.config.schema import OptimizerConfig
from trainwright.errors import ConfigError, ModelError, UsageError
from trainwright.optim.blocks import BLOCK, takes
from trainwright.optim.catalogue import constructor_arguments, optimizer_class, refuse_whole_matrix, with_fused
from trainwright.optim.compact_adamw import CompactAdamW
from trainwright.optim.disk import DiskAdamW, DiskHandle, DiskParameter, DiskSettings
from trainwright.optim.groups import HiddenMatrix, ShardedParameter, group_parameters, local_tensor, shard_parameters
from trainwright.optim.handle import OptimizerHandle
from trainwright.optim.muon import Muon, is_hidden_matrix
from trainwright.optim.offload import HostParameter, OffloadedHandle, offload_shards
from trainwright.optim.whole_matrices import matrix_layout
from trainwright.precision.policy import DTYPES

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(
    parameters: NamedParameters,
    config: OptimizerConfig,
    *,
    hidden: Collection[str] | None = None,
    offload: bool = False,
    force_offload: bool = False,
    elsewhere: Collection[str] = (),
    rounding: str | None = None,
    disk: DiskSettings | None = None,
) -> OptimizerHandle:
    """The optimizer that `config` names, over the trainable ones of `parameters` (after sharding).

    Args:
        parameters: names and parameters of the model; tied ones may come twice.
        config: name, hyperparameters, groups by name pattern.
        hidden: muon: names of the hidden matrices (`hidden_matrices(model)`); by default their names and shapes tell.
        offload: keep master weights and states in host memory.
        force_offload: copy even where the parameters are in host memory (tests).
        elsewhere: names of parameters that other pipeline ranks hold.
        rounding: of masters in bf16 (`CompactAdamW`); None: they are wide.
        disk: keep the states in files; adamw and adam.

    Raises ConfigError for an unknown name or option, for a word that cannot act, for a pattern without a match.
    """
    target = optimizer_class(config.name)
    arguments = constructor_arguments(target, config)
    if config.moments in ("bf16", "8bit") or rounding is not None:
        moments = torch.uint8 if config.moments == "8bit" else DTYPES[config.moments or "bf16"]
        arguments |= {"decoupled": target is torch.optim.AdamW, "moments": moments}
        arguments |= {} if rounding is None else {"rounding": rounding}
        target = CompactAdamW
    shards = shard_parameters(parameters)
    if offload:
        shards = offload_shards(shards, force_offload)
    if disk is not None:
        arguments |= {"decoupled": target is torch.optim.AdamW}
        target = DiskAdamW
        shards = [DiskParameter.on_disk(shard, disk.folder, disk.masters) for shard in shards]
    if config.moments == "8bit":
        _refuse_cut_blocks(shards)
    is_hidden = None
    if target is Muon:
        is_hidden = _hidden_predicate(hidden, shards)
    groups = group_parameters(shards, config, is_hidden, elsewhere)
    ratios = [_lr_ratio(group, config) for group in groups]
    for group, ratio in zip(groups, ratios, strict=True):
        group["lr"] = config.lr * ratio
    arguments = with_fused(target, arguments, {shard.local.device.type for shard in shards})
    try:
        optimizer = target(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"optimizer.name: {config.name} refused its arguments: {error}",
            "the values are those that its constructor takes",
            "see its documentation",
        ) from error
    if isinstance(optimizer, Muon):
        _tell_layouts(optimizer, shards)
    handle = _handle(optimizer, shards)
    handle.set_peak_lr(config.lr, ratios)
    return handle


def _handle(
    optimizer: torch.optim.Optimizer, shards: list[ShardedParameter], restores_hyperparameters: bool = False
) -> OptimizerHandle:
    if isinstance(optimizer, CompactAdamW):
        optimizer.in_blocks = _kept_in_blocks(shards)
    if isinstance(optimizer, DiskAdamW):
        return DiskHandle(optimizer, [s for s in shards if isinstance(s, DiskParameter)])
    kind = OffloadedHandle if any(isinstance(s, HostParameter) for s in shards) else OptimizerHandle
    return kind(optimizer, shards, restores_hyperparameters)


def _kept_in_blocks(shards: Sequence[ShardedParameter]) -> Callable[[torch.Tensor], bool]:
    """Which local shards' moments can be of 8 bits: told by the whole parameters, so that every layout of them agrees."""
    taken = {id(shard.local) for shard in shards if takes(shard.parameter.shape)}
    return lambda local: id(local) in taken


def _refuse_cut_blocks(shards: Sequence[ShardedParameter]) -> None:
    """Raises ModelError where a rank has a part of a block's columns."""
    for shard in shards:
        columns = shard.local.shape[-1] if shard.local.ndim else 0
        if takes(shard.parameter.shape) and columns % BLOCK:
            raise ModelError(
                f"optimizer.moments=8bit: {shard.name} has {shard.parameter.shape[-1]} columns, {columns} on each rank",
                f"{BLOCK} columns share a scale, on one rank",
                "a smaller parallel.tensor, or optimizer.moments=bf16",
            )


def _lr_ratio(group: Mapping[str, Any], config: OptimizerConfig) -> float:
    """A group's learning rate over the config's `lr`."""
    ratio = float(group["lr_scale"])
    if group.get("muon", True):
        return ratio
    return ratio if config.adamw_lr is None else ratio * config.adamw_lr / config.lr


def _hidden_predicate(hidden: Collection[str] | None, shards: list[ShardedParameter]) -> HiddenMatrix:
    """Which parameters are Muon's. Raises ModelError where none is."""
    names = (
        frozenset(shard.name for shard in shards if is_hidden_matrix(shard.name, shard.parameter))
        if hidden is None
        else frozenset(hidden)
    )
    if not any(shard.name in names for shard in shards):
        raise ModelError(
            "optimizer.name: muon on a model without a trainable hidden matrix",
            "muon takes weights of two dimensions that are neither embeddings nor the output head",
            "optimizer.name: adamw",
        )
    return lambda shard: shard.name in names


def _tell_layouts(optimizer: Muon, shards: list[ShardedParameter]) -> None:
    muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    optimizer.set_layouts({s.local: matrix_layout(s.name, s.parameter) for s in shards if id(s.local) in muon})


def use_optimizer(
    optimizer: torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    old_to_name: Mapping[int, str],
    parameters: NamedParameters,
    *,
    offload: bool = False,
    force_offload: bool = False,
) -> OptimizerHandle:
    """The user's own optimizer: an instance (`adopt_optimizer`), or a callable that gets the list of local shards."""
    by_name = dict(parameters)
    shards = shard_parameters(by_name.items())
    if offload:
        shards = offload_shards(shards, force_offload)
    if isinstance(optimizer, torch.optim.Optimizer):
        return adopt_optimizer(optimizer, {old: by_name.get(name) for old, name in old_to_name.items()}, shards)
    built = optimizer([shard.local for shard in shards])
    if not isinstance(built, torch.optim.Optimizer):
        raise UsageError(
            f"initialize(optimizer=): the callable returned a {type(built).__name__}",
            "it takes the list of parameters and returns a torch.optim.Optimizer",
            "optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)",
        )
    refuse_whole_matrix(type(built), "initialize(optimizer=)")
    ours = {id(shard.local) for shard in shards}
    if any(id(p) not in ours for group in built.param_groups for p in group["params"]):
        raise UsageError(
            "initialize(optimizer=): the callable's optimizer holds tensors that it was not given",
            "it is built on the parameters that the callable gets",
            "optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)",
        )
    if isinstance(built, Muon):
        _tell_layouts(built, shards)
    return _handle(built, shards, restores_hyperparameters=True)


def adopt_optimizer(
    optimizer: torch.optim.Optimizer,
    old_to_new: Mapping[int, nn.Parameter | None],
    shards: Sequence[ShardedParameter],
) -> OptimizerHandle:
    """An optimizer that was built on the model's parameters before sharding, put onto their local shards.

    Groups, hyperparameters and the object itself stay, so that a torch LRScheduler tied to it keeps working.
    Parameters of the model that are frozen are dropped from it.

    Args:
        optimizer: without state: it has not stepped.
        old_to_new: id of each parameter before sharding, to the parameter that took its place.
        shards: the trainable parameters.

    Raises UsageError if it has stepped, ModelError for a parameter that is not the model's, ConfigError for a class
    that cannot run on shards.
    """
    refuse_whole_matrix(type(optimizer), "initialize(optimizer=)")
    initial = _adagrad_start(optimizer)
    if optimizer.state and initial is None:
        raise UsageError(
            f"initialize(optimizer=): this {type(optimizer).__name__} has state already",
            "an optimizer is handed over before its first step",
            "pass a callable, such as optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)",
        )
    local_of = {id(shard.parameter): shard.local for shard in shards}
    swapped: list[list[nn.Parameter]] = []
    for group in optimizer.param_groups:
        swapped.append([])
        for old in group["params"]:
            new = old_to_new.get(id(old))
            if new is None:
                raise ModelError(
                    f"initialize(optimizer=): it holds a parameter of shape {tuple(old.shape)} that is not the model's",
                    "the optimizer is built on the parameters of the model that is passed",
                    "torch.optim.AdamW(model.parameters()), after the model is complete; or pass a callable",
                )
            if id(new) in local_of:
                swapped[-1].append(local_of[id(new)])
    if not any(swapped):
        raise ModelError(
            "initialize(optimizer=): none of its parameters is trainable",
            "an optimizer needs at least one",
            "shorten `freeze`, or build it on the parameters that are trained",
        )
    optimizer.state.clear()
    for group, params in zip(optimizer.param_groups, swapped, strict=True):
        group["params"][:] = params
        if initial is not None:
            for param in params:
                optimizer.state[param] = {"step": torch.zeros(()), "sum": torch.full_like(param, initial)}
    if isinstance(optimizer, Muon):
        _tell_layouts(optimizer, list(shards))
    return _handle(optimizer, list(shards), restores_hyperparameters=True)


def _adagrad_start(optimizer: torch.optim.Optimizer) -> float | None:
    """The value that an Adagrad without a step has in its state from the start; None for anything else."""
    if type(optimizer) is not torch.optim.Adagrad or any(float(s["step"]) for s in optimizer.state.values()):
        return None
    return float(optimizer.defaults["initial_accumulator_value"])


def state_bytes(handle: OptimizerHandle) -> int:
    """Bytes of optimizer state that this rank holds (without the master weights)."""
    return sum(local_tensor(t).nbytes if isinstance(t, DTensor) else t.nbytes for t in handle.state().values())
