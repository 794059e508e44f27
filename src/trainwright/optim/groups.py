"""Parameters as an optimizer sees them: local shards, in groups with hyperparameters of their own.

After `fully_shard` a parameter is a DTensor. Elementwise optimizers do not need to know: they run on the plain
tensor that is this rank's shard, which shares the DTensor's storage, so that there is no dispatch cost and every
elementwise class of `torch.optim` works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainwright.config.schema import OptimizerConfig, ParameterGroup
from trainwright.errors import ConfigError, ModelError


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, sharing its storage; `tensor` itself, detached, when it is not a DTensor."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of the model and the tensor that the optimizer updates in its place.

    `parameter` is the model's own (a DTensor after sharding); `local` holds this rank's rows of it, in the same
    storage. A shard may be empty: more ranks than rows.
    """

    name: str
    parameter: nn.Parameter
    local: nn.Parameter

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter) -> ShardedParameter:
        """`parameter` with its local shard wrapped once."""
        return cls(name, parameter, nn.Parameter(local_tensor(parameter), requires_grad=parameter.requires_grad))

    def pull_grad(self) -> None:
        """Sets `local.grad` to this rank's part of `parameter.grad` (None stays None), without a copy."""
        current = local_tensor(self.parameter)
        if current.data_ptr() != self.local.data_ptr():
            # FSDP2 moves uneven shards into padded storage at the first forward, after `to_empty`.
            self.local.data = current
        grad = self.parameter.grad
        self.local.grad = None if grad is None else local_tensor(grad)

    def push(self) -> None:
        """Makes the model see `local`'s new values; nothing to do where the storage is shared."""

    def drop_grad(self) -> None:
        """Frees the gradient on both sides."""
        self.parameter.grad = None
        self.local.grad = None

    def as_global(self, value: torch.Tensor, columns: int = 1) -> torch.Tensor:
        """`value`, shaped like `local`, as a DTensor laid out like `parameter`; itself when that is plain.

        columns: how many of `local`'s last dimension share one of `value`'s.
        """
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return value
        shape, stride = parameter.shape, parameter.stride()
        if columns > 1:
            shape = torch.Size((*shape[:-1], shape[-1] // columns))
            stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )


def shard_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[ShardedParameter]:
    """The trainable ones of `parameters`, each once: a tied weight keeps its first name. Raises ModelError if none."""
    seen: set[int] = set()
    shards = []
    for name, parameter in parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            shards.append(ShardedParameter.of(name, parameter))
    if not shards:
        raise ModelError(
            "no parameter of the model is trainable",
            "an optimizer needs at least one",
            "shorten `freeze`, or set requires_grad",
        )
    return shards


HiddenMatrix = Callable[[ShardedParameter], bool]


def _settings(shard: ShardedParameter, config: OptimizerConfig) -> tuple[float, float, str | None]:
    """(lr_scale, weight_decay, the pattern that set them) of one parameter: the first match wins."""
    own: ParameterGroup | None = next((g for g in config.groups if fnmatchcase(shard.name, g.pattern)), None)
    decay = config.weight_decay
    # Norms' gains and biases have no scale to shrink towards zero; their decay only costs quality.
    if shard.parameter.ndim < 2 and not config.decay_norms_and_biases:
        decay = 0.0
    if own is None:
        return 1.0, decay, None
    return own.lr_scale, decay if own.weight_decay is None else own.weight_decay, own.pattern


def group_parameters(
    shards: list[ShardedParameter],
    config: OptimizerConfig,
    hidden: HiddenMatrix | None = None,
    elsewhere: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """`torch.optim` parameter groups over the shards: params, lr_scale, weight_decay (and muon, given `hidden`).

    Parameters of fewer than two dimensions are not decayed unless `decay_norms_and_biases`. elsewhere: names that other
    pipeline ranks hold. Raises ConfigError for a pattern that no parameter matches, or whose every match an earlier
    pattern takes: it could not act.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    used: set[str] = set()
    for shard in shards:
        lr_scale, weight_decay, pattern = _settings(shard, config)
        if pattern is not None:
            used.add(pattern)
        key = (lr_scale, weight_decay, hidden is not None and hidden(shard))
        groups.setdefault(key, []).append(shard.local)
    for name in elsewhere:
        used |= {next((group.pattern for group in config.groups if fnmatchcase(name, group.pattern)), "")}
    for group in config.groups:
        if group.pattern not in used:
            raise ConfigError(
                f"optimizer.groups: pattern {group.pattern!r} gives its settings to no trainable parameter",
                "every pattern matches at least one that no earlier pattern takes",
                f"names are such as {', '.join(repr(s.name) for s in shards[:3])}; for example "
                f"pattern: '*{shards[0].name.rsplit('.', 1)[-1]}'",
            )
    result = []
    for (lr_scale, weight_decay, muon), params in groups.items():
        group_dict: dict[str, Any] = {"params": params, "lr_scale": lr_scale, "weight_decay": weight_decay}
        if hidden is not None:
            group_dict["muon"] = muon
        result.append(group_dict)
    return result
