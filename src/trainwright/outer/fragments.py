"""The model's parameters as fragments, each one flat vector of this rank's shards.

A fragment is whole units (blocks, embedding, head). On a rank it is the concatenation of its shards of the fragment's
parameters, each filled up with zeros to whole blocks of the link's format: copies of a parameter on several ranks
(tensor parallel norms) then lie in equal blocks, are rounded alike and stay copies. Ranks that hold the same shards
(ZeRO stage 0, hybrid sharding) share the work: each sends and receives one slice, put together inside the group.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.errors import ContradictionError
from trainwright.optim.groups import ShardedParameter, local_tensor
from trainwright.optim.outer import BLOCK

_INDEX = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def unit_of(name: str) -> str:
    """The unit that a parameter belongs to: its name up to the block's number, or its own module."""
    found = _INDEX.match(name)
    return found.group(1) if found else name.rpartition(".")[0]


def share_out(sizes: Mapping[str, int], fragments: int) -> list[list[str]]:
    """Parameter names of each fragment; whole units, the largest first to the lightest fragment.

    A pure function of `sizes` (name -> elements of the whole parameter). Raises ContradictionError for more fragments
    than units.
    """
    units: dict[str, list[str]] = {}
    for name in sizes:
        units.setdefault(unit_of(name), []).append(name)
    if fragments > len(units):
        raise ContradictionError(
            f"outer.fragments={fragments} of a model of {len(units)} units",
            "a fragment is one unit (a block, the embedding, the head) or more",
            f"outer.fragments={len(units)}",
        )
    weights = {unit: sum(sizes[name] for name in names) for unit, names in units.items()}
    shares: list[list[str]] = [[] for _ in range(fragments)]
    loads = [0] * fragments
    for unit in sorted(units, key=lambda unit: -weights[unit]):  # stable: the model's order among equals
        lightest = min(range(fragments), key=lambda index: loads[index])
        shares[lightest] += units[unit]
        loads[lightest] += weights[unit]
    place = {name: index for index, name in enumerate(sizes)}
    return [sorted(share, key=lambda name: place[name]) for share in shares]


@dataclass(frozen=True)
class Fragment:
    """Some parameters of this rank, flat. `slices` ranks of the group hold the same; this one has slice `index`."""

    shards: tuple[ShardedParameter, ...]
    offsets: tuple[int, ...]
    """Where each shard begins in the flat vector."""
    size: int
    """Values of the flat vector: whole blocks, and as many in each slice."""
    slices: int
    index: int

    @classmethod
    def of(cls, shards: Sequence[ShardedParameter], slices: int, index: int) -> Fragment:
        """Lays `shards` one behind the other."""
        offsets, end = [], 0
        for shard in shards:
            offsets.append(end)
            end += -(-local_tensor(shard.parameter).numel() // BLOCK) * BLOCK
        piece = BLOCK * slices
        return cls(tuple(shards), tuple(offsets), -(-end // piece) * piece, slices, index)

    @property
    def slice_size(self) -> int:
        """Values that this rank sends."""
        return self.size // self.slices

    def own_slice(self, flat: Tensor) -> Tensor:
        """This rank's slice of a flat vector, a view."""
        return flat.narrow(0, self.index * self.slice_size, self.slice_size)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each shard's part of a flat vector, in the shard's shape."""
        locals_ = [local_tensor(shard.parameter) for shard in self.shards]
        return [flat[at : at + t.numel()].view(t.shape) for at, t in zip(self.offsets, locals_, strict=True)]

    def read(self) -> Tensor:
        """The shards' values now: a new flat vector, fp32, on the host (where the link is)."""
        flat = torch.zeros(self.size, dtype=torch.float32)
        for view, shard in zip(self.views(flat), self.shards, strict=True):
            view.copy_(local_tensor(shard.parameter))
        return flat

    def write(self, flat: Tensor) -> None:
        """Sets the shards to the values of a flat vector."""
        for view, shard in zip(self.views(flat), self.shards, strict=True):
            local_tensor(shard.parameter).copy_(view)

    def named(self, prefix: str, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector as tensors laid out like the parameters, for a checkpoint; they share its storage."""
        views = self.views(flat)
        return {f"{prefix}.{s.name}": s.as_global(v) for s, v in zip(self.shards, views, strict=True)}

    def fingerprint(self, crc: int = 0) -> int:
        """A checksum of the layout: equal on ranks that may average with each other."""
        text = ";".join(
            f"{s.name}{tuple(local_tensor(s.parameter).shape)}{tuple(s.parameter.shape)}" for s in self.shards
        )
        return zlib.crc32(f"{text};{self.size};{self.slices};{self.index}".encode(), crc)


def fragments_of(shards: Sequence[ShardedParameter], count: int, slices: int, index: int) -> list[Fragment]:
    """`count` fragments of this rank's parameters; a tensor that `slices` ranks hold is cut among them."""
    by_name = {shard.name: shard for shard in shards}
    shares = share_out({shard.name: shard.parameter.numel() for shard in shards}, count)
    return [Fragment.of([by_name[name] for name in names], slices, index) for names in shares]


def weights_crc(values: Tensor) -> int:
    """A checksum of fp32 values on the host."""
    return zlib.crc32(values.contiguous().numpy().data)
