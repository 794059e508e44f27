"""Watches one training step below autograd: the bytes that live tensors hold and the collectives that are issued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.dry_run.collectives import CollectiveLog, axis_names
from trainwright.dry_run.live_bytes import LiveBytes, ModelShapes
from trainwright.dry_run.work import WorkLog
from trainwright.engine import Engine
from trainwright.fused import attention, linear
from trainwright.torch_private import TorchDispatchMode

_INSIDE: dict[Any, Callable[..., Any]] = {**linear.INSIDE, **attention.INSIDE}
"""Operators of ours, opened: products and attention in fp32 are what they cost."""


class StepWatch(TorchDispatchMode):
    """Shows every operator to a `LiveBytes`, a `CollectiveLog` and a `WorkLog`.

    With `fake`, a fake tensor that the host reads reads as one: a step's norm is finite, its batch has tokens.
    """

    def __init__(self, live: LiveBytes, log: CollectiveLog, fake: bool = False) -> None:
        super().__init__()
        self.live, self.log, self.work = live, log, WorkLog()
        self.operators = 0
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes apart into local operators and collectives first
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls: autograd asks fake tensors for their device
            device = getattr(args[0], "fake_device", None)
            return func(*args, **kwargs) if device is None else device
        if (inside := _INSIDE.get(func)) is not None:
            with self:
                return inside(*args)
        self.operators += 1
        if self._fake and func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0])
        result = func(*args, **kwargs)
        self.live.note(func, args, kwargs, result)
        if CollectiveLog.is_collective(func):
            self.log.note(func, args, kwargs, result)
        else:
            self.work.note(func, args, kwargs, result)
        return result


class ReadsAsOne(TorchDispatchMode):
    """Inside it a fake tensor that the host reads reads as one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0])
        return func(*args, **(kwargs or {}))


def _one(tensor: Tensor) -> float | int:
    return 1.0 if tensor.is_floating_point() else 1


@contextmanager
def watching(engine: Engine, vocab_size: int | None, fake: bool = False) -> Iterator[StepWatch]:
    """Inside it the engine's steps are watched; what the engine holds before is counted as the state it is."""
    parameters = [p for _, p in engine.parts.update.parameters]
    live = LiveBytes(ModelShapes.of(parameters, vocab_size))
    handle = engine.parts.update.optimizer
    for buffer in engine.module.buffers():
        live.hold(buffer, "buffers")
    for state in handle.state().values():
        live.hold(state, "optimizer")
    average = engine.parts.update.ema
    for value in average.state().values() if average is not None else ():
        live.hold(value, "average")
    # Parts of a pipeline may hold a weight twice, of which the optimizer knows one.
    for parameter in (*engine.module.parameters(), *parameters):
        live.hold(parameter, "parameters")
    live.begin()

    def begin_update(*_: Any) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                live.hold(parameter.grad, "gradients")
        live.begin_update()

    def end_update(*_: Any) -> None:
        live.in_update = False

    hooks = [
        handle.optimizer.register_step_pre_hook(begin_update),
        handle.optimizer.register_step_post_hook(end_update),
    ]
    watch = StepWatch(live, CollectiveLog(axis_names(engine.parts.mesh)), fake)
    try:
        with live.following_resizes(), watch:
            yield watch
        live.end()
    finally:
        for hook in hooks:
            hook.remove()
