"""The optimizer in backward: each shard is updated as soon as its gradient is reduced, and the gradient is freed.

Whole gradients (4 bytes a parameter and rank, over the ranks that share them) never lie together: Lv et al., LOMO,
arXiv 2306.09782; torch's `register_post_accumulate_grad_hook`, which FSDP2 calls when a shard's gradient is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.errors import UsageError
from trainwright.optim.gradients import clip_coefficient, sharding_groups
from trainwright.optim.groups import ShardedParameter, local_tensor
from trainwright.optim.handle import OptimizerHandle

Coefficient = Callable[[ShardedParameter, Tensor], Tensor | float]
"""(shard, its squared 2-norm on this rank) -> what clipping multiplies the gradient by."""


@dataclass
class InBackward:
    """Steps one parameter at a time, from hooks; counts what the end of the step wants to know."""

    handle: OptimizerHandle
    factor: Tensor | None = None
    """What makes the arriving gradients those of the mean loss; None between steps: no gradient is expected."""
    coefficient: Coefficient | None = None
    keep: bool = False
    """Whether gradients are kept, before clipping, for whoever looks at them after the step (verify)."""
    idle: bool = False
    """A step without a single valid token: nothing moves, as in the plain update."""
    squares: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    """Σ squares of this rank's gradients, by the groups over which parameters are cut."""
    _single: dict[int, torch.optim.Optimizer] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        by_local = {id(shard.local): shard for shard in self.handle.parameters}
        for index, group in enumerate(self.handle.optimizer.param_groups):
            for local in group["params"]:
                shard = by_local[id(local)]
                self._single[id(local)] = _single(self.handle.optimizer, local)
                shard.parameter.register_post_accumulate_grad_hook(self._hook(shard, index))

    def begin(self, factor: Tensor, coefficient: Coefficient | None, idle: bool) -> None:
        """Before the backward of a step."""
        self.factor, self.coefficient, self.idle = factor, coefficient, idle
        self.squares.clear()
        self._done.clear()
        self.handle.forget_placeholders()

    def end(self) -> None:
        """After it."""
        self.factor = None

    def _hook(self, shard: ShardedParameter, group: int) -> Callable[[Tensor], None]:
        def update(_: Tensor) -> None:
            with torch.no_grad():
                self._update(shard, group)

        return update

    def _update(self, shard: ShardedParameter, group: int) -> None:
        if self.factor is None:
            raise UsageError(
                "a backward that the engine does not know of, with fused.optimizer_in_backward",
                "weights change during backward: one backward a step, through the engine",
                "engine(...), engine.backward(loss), engine.step(); or fused.optimizer_in_backward=false",
            )
        if shard.name in self._done:
            raise UsageError(
                f"a second gradient for {shard.name} in one backward, with fused.optimizer_in_backward",
                "a parameter has one gradient a step, complete when it arrives",
                "fused.optimizer_in_backward=false for a model that uses a sharding unit twice in a forward",
            )
        self._done.add(shard.name)
        parameter = shard.parameter
        assert parameter.grad is not None, "the hook runs when the gradient is there"
        gradient = local_tensor(parameter.grad)
        gradient *= self.factor.to(gradient.dtype)
        square = (
            gradient.double().square().sum() if gradient.dtype == torch.float64 else gradient.float().square().sum()
        )
        groups = sharding_groups(parameter)
        self.squares[groups] = self.squares.get(groups, torch.zeros_like(square, dtype=torch.float64)) + square
        kept = parameter.grad.clone() if self.keep else None
        if self.coefficient is not None:
            gradient *= self.coefficient(shard, square)
        if not self.idle:
            self._step(shard, group)
        shard.drop_grad()
        if kept is not None:
            parameter.grad = kept

    def _step(self, shard: ShardedParameter, group: int) -> None:
        shard.pull_grad()
        single = self._single[id(shard.local)]
        single.param_groups[0].update(_settings(self.handle.optimizer.param_groups[group]))
        single.step()
        shard.push()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _single(optimizer: torch.optim.Optimizer, local: torch.nn.Parameter) -> torch.optim.Optimizer:
    """An optimizer of one parameter that shares `optimizer`'s state."""
    single = copy.copy(optimizer)  # of torch's own attributes; a class may have others
    single.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "param_groups"})
    group = next(group for group in optimizer.param_groups if any(p is local for p in group["params"]))
    single.param_groups = [{**group, "params": [local]}]
    return single


def clip_each(maximum: float) -> Coefficient:
    """Each parameter's own gradient, over all ranks that hold a part of it, to at most `maximum`. Collective."""

    def coefficient(shard: ShardedParameter, square: Tensor) -> Tensor | float:
        total = square.to(torch.float64)
        for group in sharding_groups(shard.parameter):
            dist.all_reduce(total, group=group)
        found = clip_coefficient(total.sqrt(), maximum)
        return found.to(square.dtype) if isinstance(found, Tensor) else found

    return coefficient


def clip_by(norm: float | None, maximum: float) -> Coefficient | None:
    """Every gradient by what the global norm of the step before asks for; the first step as it is."""
    if norm is None:
        return None
    factor = clip_coefficient(torch.tensor(norm, dtype=torch.float64), maximum)
    return lambda shard, square: factor
