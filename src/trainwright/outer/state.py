"""What outer steps go by: synchronised weights, momentum, what formats rounded off, a step under way, the groups' cursors.

All of it is in the host's memory, fp32, one flat vector a fragment (fragments.py). It travels in checkpoints as tensors
laid out like the parameters, so that it can be read back on any mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.checkpoint.load import load
from trainwright.config.outer_schema import OuterConfig
from trainwright.errors import CheckpointError
from trainwright.optim.groups import local_tensor
from trainwright.optim.outer import late_weights, nesterov_
from trainwright.outer.fragments import Fragment

PREFIX = "outer"


@dataclass
class Landed:
    """An outer step that has been averaged and is not applied yet."""

    fragment: int
    step: int
    """Inner steps after which it was sent."""
    mean: Tensor
    """Outer gradient of the whole fragment, fp32 [n]."""


@dataclass
class OuterState:
    """Of one rank. `whole` puts together the slices that ranks with the same shards hold. Collective."""

    settings: OuterConfig
    fragments: list[Fragment]
    whole: Callable[[Fragment, Tensor], Tensor]
    weights: list[Tensor] = field(init=False)
    """Synchronised weights of each fragment, the same bits in every group."""
    momentum: list[Tensor] = field(init=False)
    residual: list[Tensor | None] = field(init=False)
    """Of this rank's slices: what the format rounded off; None under fp32, where nothing is."""
    sent: Tensor | None = field(default=None, init=False)
    """The group's own weights when the step under way was sent; None where they are not needed."""
    cursors: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)
    """group -> (inner step, position in the order of the data) of what last went into the synchronised weights."""

    def __post_init__(self) -> None:
        self.weights = [fragment.read() for fragment in self.fragments]
        self.momentum = [torch.zeros_like(w) for w in self.weights]
        self.forget_residuals()

    def forget_residuals(self) -> None:
        """Nothing rounded off: at the start, and where this group's weights were replaced."""
        rounds = self.settings.dtype != "fp32"
        self.residual = [torch.zeros(f.slice_size) if rounds else None for f in self.fragments]

    @torch.no_grad()
    def outer_gradient(self, index: int) -> Tensor:
        """This rank's slice of synchronised - own weights; keeps the own ones where the step will come late."""
        fragment = self.fragments[index]
        own = fragment.read()
        keeps = self.settings.overlap and self.settings.correction == "shift"
        self.sent = own if keeps else None
        return fragment.own_slice(self.weights[index]) - fragment.own_slice(own)

    @torch.no_grad()
    def step(self, index: int, mean: Tensor) -> None:
        """The outer step on the synchronised weights of a fragment."""
        nesterov_(self.weights[index], self.momentum[index], mean, self.settings.lr, self.settings.momentum)

    @torch.no_grad()
    def apply(self, landed: Landed, keep_own_steps: bool = True) -> None:
        """The outer step, and the group's own weights after it: inner steps made since it was sent are kept in them."""
        fragment = self.fragments[landed.fragment]
        self.step(landed.fragment, landed.mean)
        mixes = keep_own_steps and self.settings.overlap and self.settings.correction == "mix"
        own_share = self.settings.own_share if mixes else None
        synchronised = self.weights[landed.fragment]
        if not keep_own_steps or (self.sent is None and own_share is None):
            fragment.write(synchronised)
        else:
            fragment.write(late_weights(synchronised, fragment.read(), self.sent, own_share))
        self.sent = None

    def write_all(self) -> None:
        """The synchronised weights in the model's place."""
        for fragment, weights in zip(self.fragments, self.weights, strict=True):
            fragment.write(weights)

    # --- for another group -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self, landed: Landed | None = None) -> dict[str, Tensor]:
        """What a group that comes back needs, of this rank's slices: a copy. While an outer step is under way none of it
        changes, so the background may call this. landed: a step that the cursors count already, made in the copy."""
        found = {"cursors": torch.tensor([[g, *c] for g, c in sorted(self.cursors.items())], dtype=torch.int64)}
        for index, fragment in enumerate(self.fragments):
            weights, momentum = self.weights[index], self.momentum[index]
            if landed is not None and landed.fragment == index:  # whole, and cut then: the same bits as everywhere
                weights, momentum = weights.clone(), momentum.clone()
                nesterov_(weights, momentum, landed.mean, self.settings.lr, self.settings.momentum)
            for name, flat in (("weights", weights), ("momentum", momentum)):
                found[f"{name}.{index}"] = fragment.own_slice(flat).clone()
        return found

    def take_snapshot(self, tensors: Mapping[str, Tensor]) -> None:
        """Another group's `snapshot` in the place of all this. Collective. Raises CheckpointError where it does not fit."""
        for index, fragment in enumerate(self.fragments):
            for name, flats in (("weights", self.weights), ("momentum", self.momentum)):
                part = tensors.get(f"{name}.{index}")
                if part is None or part.shape != (fragment.slice_size,) or part.dtype != torch.float32:
                    raise CheckpointError(
                        f"another group's {name} of fragment {index}: {None if part is None else tuple(part.shape)}",
                        f"{fragment.slice_size} fp32 values, the slice of this rank",
                        "the same model, ranks and outer.fragments in every group",
                    )
                flats[index] = self.whole(fragment, part)
        self.cursors = {g: (step, at) for g, step, at in tensors["cursors"].view(-1, 3).tolist()}
        self.sent = None
        self.forget_residuals()

    # --- for checkpoints -------------------------------------------------------------------------------------------

    def tensors(self, landed: Landed | None) -> dict[str, Tensor]:
        """By name, laid out like the parameters. Collective."""
        found: dict[str, Tensor] = {}
        for index, fragment in enumerate(self.fragments):
            flats = {"weights": self.weights[index], "momentum": self.momentum[index]}
            residual = self.residual[index]
            if residual is not None:
                flats["residual"] = self.whole(fragment, residual)
            if landed is not None and landed.fragment == index:
                flats["mean"] = landed.mean
                if self.sent is not None:
                    flats["sent"] = self.sent
            for name, flat in flats.items():
                found |= fragment.named(f"{PREFIX}.{name}", flat)
        return found

    def scalars(self, landed: Landed | None) -> dict[str, Any]:
        """The rest, as JSON."""
        under_way = None
        if landed is not None:
            under_way = {"fragment": landed.fragment, "step": landed.step, "of": self._kind()}
        return {"cursors": [[g, *c] for g, c in sorted(self.cursors.items())], "under_way": under_way}

    def load(self, path: Path, scalars: Mapping[str, Any]) -> Landed | None:
        """Takes both back from a checkpoint that has just been verified; the step under way. Collective."""
        self.cursors = {g: (step, at) for g, step, at in scalars["cursors"]}
        landed = None
        if (under_way := scalars["under_way"]) is not None:
            if under_way["of"] != self._kind():
                raise CheckpointError(
                    f"{path} has an outer step under way, made with other fragments or another correction",
                    "it is applied as it was sent",
                    f"outer.fragments={under_way['of'][0]} and outer.correction={under_way['of'][1]}",
                )
            mean = torch.zeros(self.fragments[under_way["fragment"]].size)
            landed = Landed(int(under_way["fragment"]), int(under_way["step"]), mean)
            keeps = self.settings.overlap and self.settings.correction == "shift"
            self.sent = torch.zeros_like(mean) if keeps else None
        wanted = self.tensors(landed)
        load(path, wanted, strict=False, verified=True)
        for index, fragment in enumerate(self.fragments):
            self._fill(fragment, "weights", self.weights[index], wanted)
            self._fill(fragment, "momentum", self.momentum[index], wanted)
            residual = self.residual[index]
            if residual is not None:
                flat = torch.zeros(fragment.size)
                self._fill(fragment, "residual", flat, wanted)
                residual.copy_(fragment.own_slice(flat))
            if landed is not None and landed.fragment == index:
                self._fill(fragment, "mean", landed.mean, wanted)
                if self.sent is not None:
                    self._fill(fragment, "sent", self.sent, wanted)
        return landed

    def _kind(self) -> list[Any]:
        return [self.settings.fragments, self.settings.correction if self.settings.overlap else "none"]

    def _fill(self, fragment: Fragment, name: str, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        for view, shard in zip(fragment.views(flat), fragment.shards, strict=True):
            view.copy_(local_tensor(tensors[f"{PREFIX}.{name}.{shard.name}"]))
