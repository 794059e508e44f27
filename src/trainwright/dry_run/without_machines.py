"""What stands in for machines in a dry run: the process group, the memory, the neighbours in a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainwright.engine import Engine
from trainwright.ledger import here
from trainwright.optim.groups import ShardedParameter, local_tensor
from trainwright.other_machines import as_on_any_machine
from trainwright.parallel.allocate import Allocate, allocate
from trainwright.parallel.pipeline.model import PipelineModel
from trainwright.torch_private import (
    TorchDispatchMode,
    forget_meshes,
    quiet_known_warnings,
    start_fake_process_group,
)

Message = tuple[tuple[int, ...], torch.dtype]
"""Shape and format of what a pipeline stage sends to the next one."""


@contextmanager
def standing_for(rank: int, world_size: int, this_processor: bool = False) -> Iterator[None]:
    """Inside it this process is rank `rank` of `world_size`, alone; what it sends goes nowhere. Products are made as on machines
    that have the instructions, and exchanged as between GPUs, unless for `this_processor`."""
    start_fake_process_group(rank, world_size)
    forget_meshes()
    try:
        with here.aside(), warnings.catch_warnings(), nullcontext() if this_processor else as_on_any_machine():
            quiet_known_warnings()
            # A fake tensor has no address; where two are compared, they are the same (none).
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


def allocating(fakes: Any) -> Allocate:
    """What gives shards shapes instead of memory, as an engine is built.

    `apply` itself runs on the meta device: FSDP2 shards there, and cannot inside a fake tensor mode.
    """

    def allocate_fakes(module: nn.Module, device: torch.device, buffer_device: torch.device | None = None) -> None:
        with fakes:
            allocate(module, device, buffer_device)

    return allocate_fakes


def settle(engine: Engine) -> None:
    """Brings FSDP2 and the optimizer to where a first step leaves them. Fake tensors active.

    At its first use FSDP2 takes an uneven shard into a padded copy, unless it finds by the address that it has done so;
    fake tensors have none. The optimizer then follows, which also goes by addresses.
    """
    for module in engine.module.modules():  # roots come before what they hold
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
    for shard in engine.parts.update.optimizer.parameters:
        if type(shard) is ShardedParameter:  # an offloaded one has a copy of its own
            shard.local.data = local_tensor(shard.parameter)


class _UntilSent(TorchDispatchMode):
    """Ends a forward at the first activations that leave the rank."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.send.default and args[0][0].is_floating_point():
            raise _SentError((tuple(args[0][0].shape), args[0][0].dtype))
        return func(*args, **(kwargs or {}))


class _SentError(Exception):
    def __init__(self, message: Message) -> None:
        super().__init__(message)
        self.message = message


def first_message(engine: Engine, micro_batch: Any) -> Message:
    """What the first stage of a pipeline sends on for `micro_batch`. On a rank of the first stage, fake tensors active."""
    model = engine.parts.model
    assert isinstance(model, PipelineModel), "a mesh with a pipeline axis has a pipeline runner"
    engine.eval()
    try:
        with torch.no_grad(), _UntilSent():
            model.forward_through(micro_batch)
    except _SentError as sent:
        return sent.message
    finally:
        engine.train()
        engine.parts.model.end_step()
    raise AssertionError("the first stage of a pipeline sends its output on")
