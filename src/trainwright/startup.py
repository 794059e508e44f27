"""From a settled config to an engine: the one file that knows every room and puts the parts together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainwright import distributed
from trainwright.allocator import give_back_freed_memory, keep_freed_memory
from trainwright.checkpoint.load import load_weights
from trainwright.checkpoint.weights import initialise
from trainwright.config import Resolved
from trainwright.data.plan import rows_and_accumulation
from trainwright.distributed import World
from trainwright.engine import Engine
from trainwright.errors import ConfigError, ContradictionError
from trainwright.freeze import freeze
from trainwright.fused.token_losses import LossTerms
from trainwright.guard.limits import Limits
from trainwright.guard.same_config import check_same_config
from trainwright.guard.watch import watch_ranks
from trainwright.ledger import here
from trainwright.mapped_file import allow_open_files, offload_folder
from trainwright.mesh import Mesh, build_mesh
from trainwright.micro_batches import micro_batch_loss
from trainwright.model_source import Model, module_of, prepare_values
from trainwright.models.documents import check_document_mask
from trainwright.models.pretrained import count_valid_tokens
from trainwright.optim.build import build_optimizer, use_optimizer
from trainwright.optim.disk import DiskSettings
from trainwright.optim.ema import WeightAverage
from trainwright.optim.muon import hidden_matrices
from trainwright.optim.schedules import build_schedule, drive_lr
from trainwright.other_machines import planned_for
from trainwright.parallel.allocate import Allocate, InFiles, allocate
from trainwright.parallel.apply import ApplySettings, apply
from trainwright.parallel.captured import CapturedStep
from trainwright.parallel.compile import compiles
from trainwright.parallel.parallel_model import ParallelModel
from trainwright.parallel.zero import ZeroSettings
from trainwright.parts import Parts
from trainwright.precision.loss_scaler import build_loss_scaler
from trainwright.precision.policy import build_policy
from trainwright.randomness import Randomness, randomness_of
from trainwright.update import Update
from trainwright.update_in_backward import UpdateInBackward

UserOptimizer = torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer]
UserSchedule = Callable[[Any], float] | torch.optim.lr_scheduler.LRScheduler


@dataclass(frozen=True)
class UserParts:
    """What a Python caller brings instead of the config's."""

    optimizer: UserOptimizer | None = None
    lr_schedule: UserSchedule | None = None
    shard_units: Sequence[str | type[nn.Module]] | None = None
    load_weights: Callable[[nn.Module], None] | None = None
    """Fills the shards of a model on the meta device, instead of initial values (pretrained weights)."""
    tensor_plan: Mapping[str, str] | None = None
    pipeline_plan: Sequence[str] | None = None
    allocate: Allocate = allocate


def build_engine(
    model: Model, resolved: Resolved, user: UserParts, horizon_steps: int | None, accumulation: int | None = None
) -> Engine:
    """`initialize` after the config is settled. Collective.

    accumulation: that of a loader's plan (a resumed run keeps its global batch); by default the config's.
    """
    offload = resolved.config.offload
    on_disk = "disk" in (offload.optimizer, offload.parameters)
    if on_disk:
        allow_open_files()
    world = distributed.start(resolved.config.parallel.backend)
    if on_disk:
        give_back_freed_memory()
    elif world.device.type == "cpu":
        keep_freed_memory()
    with here.call("initialize", 0):
        return _build(model, resolved, user, horizon_steps, accumulation, world)


def _build(
    model: Model, resolved: Resolved, user: UserParts, horizon_steps: int | None, accumulation: int | None, world: World
) -> Engine:
    config = resolved.config
    check_same_config(config)
    schedule = user.lr_schedule or build_schedule(config.lr_schedule, horizon_steps)  # its errors come before the work
    mesh = build_mesh(config.parallel, config.zero.stage, world.device)
    if not mesh.degrees.pipeline == mesh.degrees.context == mesh.degrees.tensor == 1:
        here.ranks_differ()
    if config.guard.watch:
        watch_ranks(Limits(config.guard.disagree, config.guard.wait, config.guard.first_wait))
    if accumulation is None:
        _, accumulation = rows_and_accumulation(config.batch, config.data.sequence_length, mesh.data_parallel_size)
    if config.fused.optimizer_in_backward and accumulation > 1:
        raise ContradictionError(
            f"{accumulation} micro-batches a step with fused.optimizer_in_backward",
            "a gradient is complete when its backward ends: one micro-batch a step",
            "batch.accumulation=1 (recompute=full for the memory), or fused.optimizer_in_backward=false",
        )
    sharded = build_model(model, resolved, user, mesh)
    module = sharded.model.module
    if config.init_from is not None:
        load_weights(config.init_from, {f"model.{name}": tensor for name, tensor in sharded.model.state()})
    module.train()
    update = _build_update(sharded, resolved, user, schedule, mesh)
    randomness = randomness_of(module, config.seed, mesh)
    return Engine(
        Parts(
            sharded.model,
            mesh,
            update,
            resolved,
            accumulation,
            randomness,
            functools.partial(count_valid_tokens, module),
            _captured(sharded.model, randomness) if config.fused.cuda_graphs and not planned_for() else None,
        )
    )


def _captured(model: ParallelModel, randomness: Randomness) -> CapturedStep:
    device = model.mesh.device
    if device.type != "cuda" or not model.plain:
        ranks = dist.get_world_size()
        raise ContradictionError(
            "fused.cuda_graphs=true on "
            + ("a CPU" if device.type != "cuda" else f"{ranks} ranks" if ranks > 1 else "a model that FSDP2 wraps"),
            "a CUDA graph is of one GPU that holds the model by itself, in parameters that its modules use as they are",
            "fused.cuda_graphs=false",
        )
    randomness.watches = True
    drawn = "the model draws random numbers from torch's generators, dropout's for one"
    return CapturedStep(model.module, device, model.end_step, lambda: drawn if randomness.drawn else "")


@dataclass(frozen=True)
class ShardedModel:
    """A model after `apply`, and what an optimizer has to know of it from before."""

    model: ParallelModel
    names_before: dict[int, str]
    """id of each parameter before sharding -> its name: a user's optimizer holds those."""
    hidden: frozenset[str] | None
    """muon: names of the hidden matrices."""


def build_model(model: Model, resolved: Resolved, user: UserParts, mesh: Mesh) -> ShardedModel:
    """Shards `model` and fills it: training without the optimizer, or all that inference needs. Collective."""
    config = resolved.config
    policy = build_policy(config.precision, config.offload.masters == "disk")
    module = module_of(model, config.seed)
    if config.data.document_mask:
        check_document_mask(module)
    names_before = {id(p): name for name, p in module.named_parameters()}
    hidden = hidden_matrices(module) if config.optimizer.name.lower() == "muon" else None
    freeze(module, config.freeze)
    initial = functools.partial(initialise, seed=config.seed)
    values = prepare_values(module, policy.master, mesh.device, user.load_weights, initial)
    offloaded, allocate_shards = config.offload.parameters, user.allocate
    if offloaded == "disk":
        allocate_shards = InFiles(offload_folder(config.offload.path, config.run_dir))

    def fill(shards: nn.Module) -> None:
        allocate_shards(shards, mesh.device if offloaded == "none" else torch.device("cpu"), mesh.device)
        if values is not None:
            values(shards)

    settings = ApplySettings(
        ZeroSettings(config.zero.stage, policy, config.keep_fp32, offloaded),
        config.parallel,
        config.recompute,
        compiles(config, module, user.shard_units, mesh.device),
        config.precision.float8,
        LossTerms(config.loss.label_smoothing, config.loss.z_loss),
        user.shard_units,
        user.tensor_plan,
        user.pipeline_plan,
    )
    return ShardedModel(
        apply(module, mesh, settings, micro_batch_loss, fill if values is not None or offloaded == "disk" else None),
        names_before,
        hidden,
    )


def _build_update(sharded: ShardedModel, resolved: Resolved, user: UserParts, schedule: Any, mesh: Mesh) -> Update:
    config = resolved.config
    offload, disk = config.offload.optimizer == "cpu", None
    if config.offload.optimizer == "disk":
        disk = DiskSettings(
            offload_folder(config.offload.path, config.run_dir), masters=config.offload.masters == "disk"
        )
    parameters = sharded.model.named_parameters()
    if user.optimizer is not None:
        if any(resolved.was_set(f"optimizer.{key}") for key in type(config.optimizer).model_fields):
            raise ConfigError(
                "an optimizer in the config and optimizer= in the call",
                "one of them decides",
                "leave `optimizer` out of the config",
            )
        if disk is not None:
            raise ConfigError(
                "offload.optimizer=disk with optimizer= in the call",
                "what is streamed from files is the state of the config's adamw or adam",
                "offload.optimizer=cpu, or leave optimizer= out",
            )
        handle = use_optimizer(user.optimizer, sharded.names_before, parameters, offload=offload)
    else:
        handle = build_optimizer(
            parameters,
            config.optimizer,
            hidden=sharded.hidden,
            offload=offload,
            elsewhere=sharded.model.held_elsewhere(),
            rounding=None if config.precision.master == "fp32" else config.precision.master.removeprefix("bf16_"),
            disk=disk,
        )
    ema = WeightAverage(handle.parameters, config.ema) if config.ema is not None else None
    driver = drive_lr(schedule, handle)
    driver.before_step(0)
    scaler = build_loss_scaler(config.precision)
    kind = UpdateInBackward if config.fused.optimizer_in_backward else Update
    return kind(mesh, parameters, handle, driver, scaler, ema, config, sharded.model.second_copies())
