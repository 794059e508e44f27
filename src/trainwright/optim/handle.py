"""An optimizer over local shards: step, learning rate, and its state in the form that checkpoints take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainwright.errors import CheckpointError, ModelError
from trainwright.optim.groups import ShardedParameter, local_tensor

_NUMBERS = (bool, int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold `value` (tuples come back as lists, which is seen to)."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _NUMBERS)


class OptimizerHandle:
    """What the engine holds of an optimizer, whoever built it.

    Attributes:
        optimizer: the torch optimizer, over `local` of each of `parameters`.
        parameters: the trainable parameters, each once.
        restores_hyperparameters: the user's own optimizer: a checkpoint brings its groups' hyperparameters back
            (a torch LRScheduler computes from them). Those out of the config follow the config.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[ShardedParameter],
        restores_hyperparameters: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.restores_hyperparameters = restores_hyperparameters
        peaks = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._peak_lrs = peaks
        self._peak_lr = peaks[0]
        self._placeholders: list[ShardedParameter] = []

    def set_peak_lr(self, lr: float, ratios: Sequence[float]) -> None:
        """`lr` of the config, and each group's share of it (`lr_scale`, Muon's `adamw_lr`)."""
        self._peak_lr = lr
        self._peak_lrs = [lr * ratio for ratio in ratios]

    @property
    def peak_lr(self) -> float:
        """Learning rate at a schedule's factor of 1: the config's `lr`, or that of the user's first group."""
        return self._peak_lr

    @property
    def lr(self) -> float:
        """Learning rate now, on the scale of `peak_lr`."""
        reference = max(range(len(self._peak_lrs)), key=lambda index: self._peak_lrs[index])
        peak = self._peak_lrs[reference]
        now = float(self.optimizer.param_groups[reference]["lr"])
        return now * self._peak_lr / peak if peak else now

    def set_lr_factor(self, factor: float) -> None:
        """Sets every group to its peak learning rate times `factor`."""
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate; groups keep their ratios to it."""
        self.set_lr_factor(lr / self._peak_lr if self._peak_lr else 0.0)

    @torch.no_grad()
    def step(self) -> None:
        """One update of the model's parameters out of their gradients, nothing else (no clipping, no schedule)."""
        self.forget_placeholders()
        for shard in self.parameters:
            shard.pull_grad()
        self.optimizer.step()
        for shard in self.parameters:
            shard.push()

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for shard in self.parameters:
            shard.drop_grad()

    def masters(self) -> dict[str, Tensor]:
        """Values, by name, of parameters of which the model holds rounded copies; usually none."""
        return {}

    def weights_loaded(self) -> None:
        """After a checkpoint filled the model, or `masters` in its place."""

    def describe(self) -> str:
        """What there is to say at the start of where the state lies, or nothing."""
        return ""

    # State, for checkpoints ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor | DTensor]:
        """Tensors by `name.key`: elementwise ones laid out like the parameter, 0-dim ones as they are.

        Empty before the first step or `materialise_state` (but for classes that create their state at once).
        Raises ModelError for a state of another shape on a parameter that is sharded: no other layout could load it.
        """
        tensors: dict[str, Tensor | DTensor] = {}
        for shard in self.parameters:
            for key, value in self.optimizer.state.get(shard.local, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{shard.name}.{key}"] = self._wrapped(shard, key, value)
        return tensors

    def _wrapped(self, shard: ShardedParameter, key: str, value: Tensor) -> Tensor | DTensor:
        if value.shape == shard.local.shape:
            return shard.as_global(value)
        if columns := getattr(self.optimizer, "shared_by_columns", {}).get(key):
            return shard.as_global(value, columns)
        parameter = shard.parameter
        sharded = isinstance(parameter, DTensor) and any(
            not isinstance(placement, Replicate) and parameter.device_mesh.size(axis) > 1
            for axis, placement in enumerate(parameter.placements)
        )
        if value.ndim and sharded:
            raise ModelError(
                f"{type(self.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {shard.name}, whose "
                f"shard is {tuple(shard.local.shape)}",
                "a state that is sharded has the parameter's shape, or none",
                "zero.stage: 0, or an elementwise optimizer such as adamw",
            )
        return value

    def materialise_state(self) -> None:
        """Creates the state that the first step would, for a checkpoint to be loaded into. Parameters do not move.

        Its values are placeholders: a step without `load_state` in between starts afresh.
        """
        init_state = getattr(self.optimizer, "init_state", None)
        if init_state is not None:
            init_state()
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [s for s in self.parameters if id(s.local) in trained and not self.optimizer.state.get(s.local)]
        groups = [dict(group) for group in self.optimizer.param_groups]
        grads = [shard.local.grad for shard in self.parameters]
        for shard in self.parameters:
            shard.local.grad = None
        for shard in missing:
            # A step on zeros in the parameter's place: no optimizer gets to see, decay or round the values.
            values = shard.local.data
            shard.local.data = torch.zeros_like(values)
            shard.local.grad = torch.zeros_like(values)
            try:
                self.optimizer.step()
            finally:
                shard.local.grad = None
                shard.local.data = values
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(saved)  # some classes count steps in their groups
        for shard, grad in zip(self.parameters, grads, strict=True):
            shard.local.grad = grad
        for shard in missing:
            for key, value in self.optimizer.state[shard.local].items():
                if key == "step":
                    self.optimizer.state[shard.local][key] = torch.zeros_like(value) if isinstance(value, Tensor) else 0
        self._placeholders += missing

    def forget_placeholders(self) -> None:
        """Before a step: state that was made for a checkpoint to be loaded into, and was not, starts afresh."""
        for shard in self._placeholders:
            self.optimizer.state.pop(shard.local, None)
        self._placeholders = []

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor | DTensor]) -> None:
        """Copies `tensors` (as `state` gives them) into the state that `materialise_state` made.

        A parameter of which nothing was saved (it never had a gradient) starts afresh. Raises CheckpointError
        where only a part was saved, or a shape differs.
        """
        for shard in self.parameters:
            own = self.optimizer.state.get(shard.local, {})
            wanted = {key: value for key, value in own.items() if isinstance(value, Tensor)}
            missing = [key for key in wanted if f"{shard.name}.{key}" not in tensors]
            if missing and len(missing) < len(wanted):
                raise CheckpointError(
                    f"the optimizer state of {shard.name} lacks {missing}",
                    f"{type(self.optimizer).__name__} needs {sorted(wanted)}",
                    "resume with the optimizer that wrote the checkpoint, or take init_from (weights only)",
                )
            if missing:
                self.optimizer.state.pop(shard.local, None)
                continue
            for key, value in wanted.items():
                saved = local_tensor(tensors[f"{shard.name}.{key}"])
                if saved.shape != value.shape:
                    raise CheckpointError(
                        f"{shard.name}.{key}: shape {tuple(saved.shape)} here",
                        f"the optimizer's is {tuple(value.shape)}",
                        "resume with the model that wrote the checkpoint",
                    )
                value.copy_(saved)
        self._placeholders = []

    def scalars(self) -> dict[str, Any]:
        """The part of the state that is not tensors, for JSON: `groups` (hyperparameters) and `state` (numbers)."""
        state: dict[str, dict[str, Any]] = {}
        for shard in self.parameters:
            own = self.optimizer.state.get(shard.local, {})
            numbers = {key: value for key, value in own.items() if not isinstance(value, Tensor) and _is_plain(value)}
            if any(value is not None for value in numbers.values()):
                state[shard.name] = numbers
        groups = []
        for group in self.optimizer.param_groups:
            plain = {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}
            groups.append({key: value for key, value in plain.items() if _is_plain(value)})
        return {"groups": groups, "state": state}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Takes `scalars()` back, after `materialise_state`. The caller has seen to it that the class is the same.

        Raises CheckpointError where the user's own optimizer has another number of groups.
        """
        groups = self.optimizer.param_groups
        if self.restores_hyperparameters and len(scalars["groups"]) != len(groups):
            raise CheckpointError(
                f"a checkpoint with {len(scalars['groups'])} parameter groups",
                f"this run's {type(self.optimizer).__name__} has {len(groups)}",
                "resume with the optimizer that wrote the checkpoint, or take init_from (weights only)",
            )
        by_name = {shard.name: shard for shard in self.parameters}
        for name, numbers in scalars["state"].items():
            if name in by_name:
                self.optimizer.state[by_name[name].local].update(numbers)
        if not self.restores_hyperparameters:
            return
        for group, saved in zip(groups, scalars["groups"], strict=True):
            for key, value in saved.items():
                current = group.get(key)
                if isinstance(current, Tensor):
                    current.fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(current, tuple) else value
