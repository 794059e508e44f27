"""A function of whole matrices, applied to matrices of which every rank holds some rows.

Each matrix has one owner among the ranks that hold copies or rows of it. One all-to-all brings the rows to the
owners, the function runs there on whole matrices, a second one takes the result's rows back; copies (the replicate
axis of a hybrid mesh) share the work and end with an all-gather. Ownership is a pure function of the shapes, so
that every rank calls the same collectives in the same order, whatever its rows; an axis of one rank has none.

Where tensor parallelism cuts a matrix too, its ranks first gather what they hold of it and go the same way side by
side. Rows that tensor ranks hold are then not in the matrix's order: the function has to commute with permutations of
the rows, as orthogonalisation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainwright.errors import ModelError
from trainwright.optim.groups import local_tensor

# Elements of the whole matrices that are in flight together: bounds the buffers to some times this over N ranks.
BUCKET_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh as a matrix sees it: `group` is None where there is nobody to talk to."""

    group: Any = None
    size: int = 1
    rank: int = 0


@dataclass(frozen=True)
class MatrixLayout:
    """Where an [R, C] matrix is: torch.chunk's rule over the tensor axis (along dimension `tensor_dim`), then over the
    shard axis by rows; the same on every replica."""

    rows: int
    columns: int
    replicate: Axis = Axis()
    shard: Axis = Axis()
    tensor: Axis = Axis()
    tensor_dim: int = 1

    def piece_of(self, tensor_rank: int, shard_rank: int) -> tuple[int, int]:
        """Rows and columns that this rank holds."""
        rows, columns = self.rows, self.columns
        if self.tensor_dim == 0:
            rows = _chunk_size(rows, self.tensor.size, tensor_rank)
        else:
            columns = _chunk_size(columns, self.tensor.size, tensor_rank)
        return _chunk_size(rows, self.shard.size, shard_rank), columns

    def rows_of(self, shard_rank: int) -> int:
        """Rows that rank `shard_rank` of the shard axis holds, its tensor ranks together; 0 where ranks outnumber them."""
        tensor_ranks = range(self.tensor.size if self.tensor_dim == 0 else 1)
        return sum(self.piece_of(t, shard_rank)[0] for t in tensor_ranks)

    @property
    def cost(self) -> int:
        """Proportional to the multiplications of a Newton-Schulz iteration."""
        small, large = sorted((self.rows, self.columns))
        return small * small * (2 * large + small)


def _chunk_size(size: int, ranks: int, rank: int) -> int:
    chunk = -(-size // ranks)
    return min(chunk, max(0, size - rank * chunk))


def matrix_layout(name: str, parameter: nn.Parameter) -> MatrixLayout:
    """The layout of a two-dimensional parameter. Raises ModelError where its rows are not sharded in order."""
    rows, columns = parameter.shape
    if not isinstance(parameter, DTensor):
        return MatrixLayout(rows, columns)
    here, ranks = local_tensor(parameter).device.type, parameter.device_mesh.device_type
    if here != ranks:
        raise ModelError(
            f"{name}: a matrix in the memory of the {here}, on ranks that talk over the {ranks}",
            "an optimizer of whole matrices runs where the ranks talk",
            "offload.optimizer: none and offload.parameters: none, or optimizer.name: adamw",
        )
    mesh = parameter.device_mesh
    axes: dict[str, Axis] = {}
    tensor_dim = 1
    for index, placement in enumerate(parameter.placements):
        if mesh.size(index) == 1:
            continue
        axis = Axis(mesh.get_group(index), mesh.size(index), mesh.get_local_rank(index))
        if (mesh.mesh_dim_names or ())[index : index + 1] == ("tensor",):
            # Replicated over the tensor ranks: each goes its own way, and they stay equal.
            if isinstance(placement, Shard):
                axes["tensor"], tensor_dim = axis, placement.dim
            continue
        # A strided shard (of no common class with Shard) is rows of what tensor ranks hold; `piece_of` cuts in that order.
        kind = "shard" if getattr(placement, "dim", None) == 0 else "replicate"
        if (kind == "replicate" and type(placement) is not Replicate) or kind in axes:
            raise ModelError(
                f"{name}: a matrix laid out as {tuple(parameter.placements)}",
                "an optimizer of whole matrices takes rows sharded over one axis of the mesh and copies over another",
                "optimizer.name: adamw",
            )
        axes[kind] = axis
    return MatrixLayout(rows, columns, **axes, tensor_dim=tensor_dim)


Owner = tuple[int, int]
"""(rank on the replicate axis, rank on the shard axis)."""


def assign_owners(layouts: list[MatrixLayout]) -> list[Owner]:
    """An owner for each matrix: the costliest first, to the rank with the least to do. Pure."""
    if not layouts:
        return []
    ranks = [(r, s) for r in range(layouts[0].replicate.size) for s in range(layouts[0].shard.size)]
    load = dict.fromkeys(ranks, 0)
    owners: list[Owner] = [(0, 0)] * len(layouts)
    for index in sorted(range(len(layouts)), key=lambda i: (-layouts[i].cost, i)):
        owner = min(ranks, key=lambda rank: (load[rank], rank))
        owners[index] = owner
        load[owner] += layouts[index].cost
    return owners


@dataclass
class _Bucket:
    """Matrices on the same axes that are exchanged together; the indices are those of the caller's list."""

    replicate: Axis
    shard: Axis
    layouts: list[MatrixLayout] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    elements: int = 0

    def add(self, index: int, layout: MatrixLayout) -> None:
        self.layouts.append(layout)
        self.indices.append(index)
        self.elements += layout.rows * layout.columns


def _buckets(layouts: list[MatrixLayout]) -> list[_Bucket]:
    """In the order of first appearance, which is the same on every rank."""
    closed: list[_Bucket] = []
    open_buckets: dict[tuple[Any, Any], _Bucket] = {}
    for index, layout in enumerate(layouts):
        key = (layout.replicate.group, layout.shard.group)
        bucket = open_buckets.get(key)
        if bucket is not None and bucket.elements + layout.rows * layout.columns > BUCKET_ELEMENTS:
            closed.append(open_buckets.pop(key))
            bucket = None
        if bucket is None:
            bucket = open_buckets[key] = _Bucket(layout.replicate, layout.shard)
        bucket.add(index, layout)
    return closed + list(open_buckets.values())


def _flat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _exchange(send: list[Tensor], receive_sizes: list[int], axis: Axis) -> list[Tensor]:
    """All-to-all over `axis`: send[i] goes to rank i; returns what came from each rank, of `receive_sizes`."""
    if axis.size == 1:
        return send
    output = send[0].new_empty(sum(receive_sizes))
    dist.all_to_all_single(output, torch.cat(send), receive_sizes, [part.numel() for part in send], group=axis.group)
    return list(output.split(receive_sizes))


def _gather_replicas(mine: Tensor, sizes: list[int], axis: Axis) -> list[Tensor]:
    """What each replica computed, flat; sizes[r] elements from replica r."""
    if axis.size == 1:
        return [mine]
    padded = mine.new_zeros(max(sizes))
    padded[: mine.numel()] = mine
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=axis.group)
    return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


def _apply_to_bucket(
    shards: list[Tensor], bucket: _Bucket, function: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """`function` of the bucket's matrices; takes and returns this rank's rows."""
    replica, shard = bucket.replicate, bucket.shard
    layouts = bucket.layouts
    owners = assign_owners(layouts)
    mine = [i for i, owner in enumerate(owners) if owner[0] == replica.rank]
    by_owner = [[i for i in mine if owners[i][1] == s] for s in range(shard.size)]
    owned = by_owner[shard.rank]

    def elements(index: int, shard_rank: int) -> int:
        return layouts[index].rows_of(shard_rank) * layouts[index].columns

    # Rows to their owners.
    arriving = [sum(elements(i, s) for i in owned) for s in range(shard.size)]
    received = _exchange([_flat([shards[i] for i in indices], shards[0]) for indices in by_owner], arriving, shard)
    pieces = [
        part.split([elements(i, s) for i in owned]) if owned else () for s, part in enumerate(received)
    ]  # pieces[s][k]: the rows of the k-th owned matrix that shard rank s holds
    whole = [
        torch.cat([pieces[s][k].view(-1, layouts[i].columns) for s in range(shard.size)]) for k, i in enumerate(owned)
    ]
    results = function(whole) if whole else []
    # The results' rows back to where they belong.
    parts = [
        result.split([layouts[i].rows_of(s) for s in range(shard.size)])
        for i, result in zip(owned, results, strict=True)
    ]
    returning = [sum(elements(i, shard.rank) for i in indices) for indices in by_owner]
    back = _exchange([_flat([part[s] for part in parts], shards[0]) for s in range(shard.size)], returning, shard)
    # And to the other replicas.
    order = [
        [i for s in range(shard.size) for i, owner in enumerate(owners) if owner == (r, s)] for r in range(replica.size)
    ]
    sizes = [sum(elements(i, shard.rank) for i in indices) for indices in order]
    output: list[Tensor] = list(shards)
    for flat, indices in zip(_gather_replicas(torch.cat(back), sizes, replica), order, strict=True):
        if indices:
            for i, rows in zip(indices, flat.split([elements(i, shard.rank) for i in indices]), strict=True):
                output[i] = rows.view(-1, layouts[i].columns)
    return output


def apply_to_whole(
    shards: list[Tensor], layouts: list[MatrixLayout], function: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """This rank's rows of `function(whole matrices)`. Collective over the matrices' mesh axes.

    Args:
        shards: [rows here, C] each, all of one dtype and device; the same list of matrices on every rank.
        layouts: of the matrices, in the same order.
        function: whole [R, C] matrices to matrices of the same shapes and dtype, each by itself.
    """
    shards = _gather_tensor_pieces(shards, layouts)
    output = list(shards)
    for bucket in _buckets(layouts):
        results = _apply_to_bucket([shards[i] for i in bucket.indices], bucket, function)
        for index, result in zip(bucket.indices, results, strict=True):
            output[index] = result
    return [_own_piece(result, layout) for result, layout in zip(output, layouts, strict=True)]


def _gather_tensor_pieces(pieces: list[Tensor], layouts: list[MatrixLayout]) -> list[Tensor]:
    """Each matrix's rows of all tensor ranks that share this shard rank, whole in their columns; in one all-gather."""
    cut = [i for i, layout in enumerate(layouts) if layout.tensor.size > 1]
    gathered = list(pieces)
    if not cut:
        return gathered
    axis = layouts[cut[0]].tensor
    shapes = [[layouts[i].piece_of(t, layouts[i].shard.rank) for i in cut] for t in range(axis.size)]
    sizes = [[rows * columns for rows, columns in row] for row in shapes]
    parts = _gather_replicas(_flat([pieces[i] for i in cut], pieces[cut[0]]), [sum(row) for row in sizes], axis)
    split = [part.split(row) for part, row in zip(parts, sizes, strict=True)]
    for k, i in enumerate(cut):
        blocks = [split[t][k].view(shapes[t][k]) for t in range(axis.size)]
        gathered[i] = torch.cat(blocks, dim=layouts[i].tensor_dim)
    return gathered


def _own_piece(rows: Tensor, layout: MatrixLayout) -> Tensor:
    """What this tensor rank keeps of its shard rank's rows."""
    if layout.tensor.size == 1:
        return rows
    sizes = [layout.piece_of(t, layout.shard.rank)[layout.tensor_dim] for t in range(layout.tensor.size)]
    return rows.split(sizes, dim=layout.tensor_dim)[layout.tensor.rank]
