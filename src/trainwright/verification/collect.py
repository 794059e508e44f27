"""What the ranks of a strategy hold, brought together on rank 0: whole gradients and weights by name, where each piece
lies, digests of all pieces, and the samples that each rank saw. Knows nothing of the layout but DTensor's placements.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.checkpoint.weights import local_part
from trainwright.data.batch import Batch
from trainwright.engine import Engine

Box = tuple[tuple[int, int], ...]
"""Where a piece lies in the whole tensor: (start, stop) for each axis."""


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor."""

    box: Box
    digest: bytes
    content: Tensor | None
    """On the CPU; None where a rank before this one sends the same box."""


@dataclass(frozen=True)
class Placement:
    """How a parameter lies on the ranks."""

    text: str
    """Such as `shard=4: S(0)`."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    boxes: dict[int, Box]
    """By rank; ranks without the parameter (other pipeline stages) are absent."""


@dataclass(frozen=True)
class Seen:
    """A micro-batch that went into a rank's model."""

    rank: int
    step: int
    index: int
    """Micro-batch of the step."""
    sample_ids: Tensor
    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Held:
    """What the ranks hold of the parameters (or their gradients) at one moment, on rank 0; empty elsewhere."""

    pieces: list[dict[str, Piece]]
    """By rank."""
    whole: dict[str, Tensor]


@dataclass(frozen=True)
class StepSeen:
    """A step, on rank 0; empty elsewhere."""

    gradients: Held
    """Of the mean loss, before clipping."""
    samples: list[Seen]


class Collector:
    """Watches one engine. Every method is collective."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rank = dist.get_rank()
        held = {
            name: (placement_text(parameter), _box(local_part(parameter)[1]), tuple(parameter.shape))
            for name, parameter in engine.parts.model.named_parameters()
        }
        self.layout: dict[str, Placement] = {}
        for rank, entries in enumerate(gathered_everywhere(held)):
            for name, (text, box, shape) in entries.items():
                self.layout.setdefault(name, Placement(text, shape, {})).boxes[rank] = box
        self._seen: list[Seen] = []
        self._gradients: tuple[dict[str, Piece], float] | None = None
        self._now: tuple[int, int] | None = None
        engine.parts.update.observe = self._observe
        self._watch_split()
        engine.parts = replace(engine.parts, randomness=self._watch(engine.parts.randomness), captured=None)

    def weights(self) -> Held:
        """The parameters."""
        parameters = self.engine.parts.model.named_parameters()
        return self._held(gathered({name: self._piece(name, p.detach()) for name, p in parameters}), 1.0)

    def step(self) -> StepSeen:
        """What has been watched in the last step. One gather."""
        assert self._gradients is not None, "a step has been made"
        (pieces, factor), seen = self._gradients, self._seen
        self._gradients, self._seen = None, []
        ranks = gathered((pieces, seen))
        return StepSeen(self._held([rank[0] for rank in ranks], factor), [one for rank in ranks for one in rank[1]])

    def tied_apart(self, ties: dict[str, str]) -> list[str]:
        """Other names of tied weights (`ties`: other name -> first) that are not one parameter where one rank has both.
        On rank 0."""
        apart = []
        by_name = dict(_named_with_aliases(self.engine))
        for alias, name in ties.items():
            if alias in by_name and name in by_name and by_name[alias] is not by_name[name]:
                apart.append(alias)
        return sorted({name for names in gathered(apart) for name in names})

    def _observe(self, parameters: Sequence[tuple[str, nn.Parameter]], factor: Tensor) -> None:
        pieces = {}
        for name, parameter in parameters:
            if parameter.requires_grad:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                pieces[name] = self._piece(name, gradient.detach())
        self._gradients = pieces, factor.item()

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        """This rank's. Its content goes with it from the first holder of its box."""
        local, slices = local_part(tensor)
        content = local.detach().to("cpu", copy=True).contiguous()
        raw: Any = content.view(-1).view(torch.uint8).numpy()
        box = _box(slices)
        first = min(rank for rank, other in self.layout[name].boxes.items() if other == box)
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        return Piece(box, digest, content if first == self.rank else None)

    def _held(self, pieces: list[dict[str, Piece]], factor: float) -> Held:
        """Whole tensors put together from the pieces, times `factor`."""
        whole: dict[str, Tensor] = {}
        for held in pieces:
            for name, piece in held.items():
                if piece.content is not None:
                    if name not in whole:
                        whole[name] = torch.full(self.layout[name].shape, torch.nan, dtype=piece.content.dtype)
                    whole[name][tuple(slice(start, stop) for start, stop in piece.box)] = piece.content
        return Held(pieces, {name: tensor * factor for name, tensor in whole.items()} if factor != 1.0 else whole)

    def _watch(self, randomness: Any) -> Any:
        """The engine asks for dropout's keys with each micro-batch in hand, right before its forward: noted there."""

        @contextlib.contextmanager
        def watched(step: int, index: int, inputs: Any) -> Iterator[None]:
            self._now = (step, index)
            self._note(inputs)
            with randomness(step, index, inputs):
                yield
            self._now = None

        return watched

    def _watch_split(self) -> None:
        """Context ranks train on a slice of the rows: what `split` gives them takes the whole micro-batch's place."""
        model: Any = self.engine.parts.model
        split = model.split

        def watched(batch: Any) -> Any:
            part = split(batch)
            self._note(part)
            return part

        model.split = watched

    def _note(self, inputs: Any) -> None:
        if self._now is not None and isinstance(inputs, Batch):
            batch = inputs.to("cpu")
            step, index = self._now
            seen = Seen(self.rank, step, index, batch.sample_ids.clone(), batch.input_ids.clone(), batch.labels.clone())
            self._seen.append(seen)


def placement_text(parameter: Tensor) -> str:
    """A parameter's mesh axes with their placements."""
    if not isinstance(parameter, DTensor):
        return "whole on its rank"
    names = parameter.device_mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(parameter.device_mesh.ndim))
    pairs = zip(names, parameter.device_mesh.shape, parameter.placements, strict=True)
    return ", ".join(f"{name}={size}: {placement}" for name, size, placement in pairs)


def gathered(value: Any) -> list[Any]:
    """Every rank's `value` in order on rank 0, an empty list elsewhere. Collective."""
    if dist.get_world_size() == 1:
        return [value]
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box, dst=0)
    return box or []


def gathered_everywhere(value: Any) -> list[Any]:
    """Every rank's `value` in order, on all ranks. Collective."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _box(slices: tuple[slice, ...]) -> Box:
    return tuple((s.start, s.stop) for s in slices)


def _named_with_aliases(engine: Engine) -> list[tuple[str, nn.Parameter]]:
    """This rank's parameters under all their names; in a pipeline, those of each of its parts."""
    model: Any = engine.parts.model
    modules = [part.module for part in getattr(model, "parts", ())] or [model.module]
    return [pair for module in modules for pair in module.named_parameters(remove_duplicate=False)]
