"""Which collectives a rank issues: kind, group and size of each, read below autograd from torch's own operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainwright.mesh import Mesh
from trainwright.torch_private import tree_leaves
from trainwright.torch_private.collectives import group_name_of

_KINDS = (  # a part of the operator's name -> what it is; the first that fits
    ("reduce_scatter", "reduce-scatter"),
    ("allgather", "all-gather"),
    ("all_gather", "all-gather"),
    ("allreduce", "all-reduce"),
    ("all_reduce", "all-reduce"),
    ("alltoall", "all-to-all"),
    ("all_to_all", "all-to-all"),
    ("broadcast", "broadcast"),
    ("send", "send"),
    ("recv", "receive"),
    ("gather", "gather"),
    ("scatter", "scatter"),
    ("reduce", "reduce"),
)
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


@dataclass(frozen=True)
class Collective:
    """One kind of message over one mesh axis, in one size."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all, broadcast, send, receive, ..."""
    axis: str
    """The mesh axis of the group (`shard`, `shard x context`), or `other` for a group that is no axis."""
    ranks: int
    size_bytes: int
    """What the whole message is: an all-gather's result, a reduce-scatter's input, else the tensor itself."""

    @property
    def sent_bytes(self) -> int:
        """What this rank sends: that of a ring's algorithm, (N-1)/N of the size, twice for an all-reduce (Patarasuk and
        Yuan, 2009); the whole tensor for a send, nothing for a receive."""
        if self.kind in ("send", "receive"):
            return self.size_bytes if self.kind == "send" else 0
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.size_bytes * (self.ranks - 1) // self.ranks


class CollectiveLog:
    """Counts the collectives among the operators that are shown to it. Groups of one rank have nothing to send and are
    left out."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        """axes: a process group's name -> the name of its mesh axis (`axis_names`)."""
        self.counts: Counter[Collective] = Counter()
        self._axes = dict(axes)

    @staticmethod
    def is_collective(operator: Any) -> bool:
        """Whether `operator` sends or receives anything."""
        return operator.namespace in _NAMESPACES and _kind(operator) is not None

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """One call of a collective operator."""
        kind = _kind(operator)
        assert kind is not None, f"{operator} is no collective"
        # The largest argument or result is the message: outputs of a gather, inputs of a scatter.
        size_bytes = max((_bytes(value) for value in (*args, *kwargs.values(), result)), default=0)
        name, ranks = group_name_of(operator, args, kwargs)
        if ranks > 1:
            self.counts[Collective(kind, self._axes.get(name, "other"), ranks, size_bytes)] += 1

    def sorted(self) -> list[tuple[Collective, int]]:
        """(collective, how many), the largest traffic first."""
        return sorted(self.counts.items(), key=lambda pair: (-pair[0].sent_bytes * pair[1], str(pair[0])))


def _kind(operator: Any) -> str | None:
    name = operator._schema.name.split("::")[1]
    return next((kind for part, kind in _KINDS if part in name), None)


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Process group's name -> axis. Where context ranks are folded into `shard` or `replicate`, the name says so."""
    names: dict[str, str] = {}
    for device_mesh in (mesh.device_mesh, mesh.parameter_mesh):
        for position, axis in enumerate(device_mesh.mesh_dim_names or ()):
            folded = device_mesh.size(position) != getattr(mesh.degrees, axis)
            names.setdefault(device_mesh.get_group(axis).group_name, f"{axis} x context" if folded else axis)
    return names
