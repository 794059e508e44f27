"""What a rank keeps between two steps, to the byte: its shards of the parameters and of Adam's moments.

Row by row as FSDP2 and tensor parallelism cut our transformer; the search reckons with sums instead, which padding and
norms make a little wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trainwright.optim.blocks import takes
from trainwright.parallel.pipeline.balance import partition
from trainwright.parallel.pipeline.order import holder
from trainwright.planner.workload import ModelShape, Plan

Cut = Literal["rows", "columns", "none"]
"""Which dimension tensor parallelism cuts."""


@dataclass(frozen=True)
class Matrix:
    """A parameter [rows, columns]; a vector has one column."""

    rows: int
    columns: int
    cut: Cut

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class RankStates:
    """Bytes of one rank between two steps."""

    parameters: int
    """Masters, with the padding of their last shards."""
    moments: int
    """Adam's two, without padding (and compensations); and each parameter's count of steps."""

    @property
    def total(self) -> int:
        return self.parameters + self.moments


def rank_states(shape: ModelShape, plan: Plan, *, stage: int = 0, shard: int = 0, tensor: int = 0) -> RankStates:
    """Of the rank at these places on the axes pipeline, shard and tensor, under ZeRO as our engine does it."""
    shards = plan.shards if plan.zero else 1
    parameters = moments = 0
    for matrix in _held(shape, plan, stage):
        rows, columns, whole_rows = _tensor_part(matrix, plan.tensor, tensor)
        if whole_rows:
            chunk = -(-rows // shards)
            here = max(0, min(chunk, rows - shard * chunk))
            padded, own = chunk * columns, here * columns
        else:  # uneven rows over tensor ranks: columns are what is sharded
            chunk = -(-columns // shards)
            here = max(0, min(chunk, columns - shard * chunk))
            padded, own = rows * chunk, rows * here
        parameters += plan.master_bytes * padded
        moments += int(_state_bytes(matrix, plan) * own) + 4
    return RankStates(parameters, moments)


def _state_bytes(matrix: Matrix, plan: Plan) -> float:
    """Of a value of `matrix`: vectors and matrices without whole blocks keep no moments in 8 bits."""
    if plan.moments == "8bit" and not (matrix.columns > 1 and takes((matrix.rows, matrix.columns))):
        return replace(plan, moments="fp32").state_bytes
    return plan.state_bytes


def _tensor_part(matrix: Matrix, ranks: int, rank: int) -> tuple[int, int, bool]:
    """(rows, columns) that a tensor rank holds, and whether ZeRO shards the rows."""
    if ranks == 1 or matrix.cut == "none":
        return matrix.rows, matrix.columns, True
    if matrix.cut == "columns":
        return matrix.rows, matrix.columns // ranks, True
    chunk = -(-matrix.rows // ranks)
    return max(0, min(chunk, matrix.rows - rank * chunk)), matrix.columns, matrix.rows % ranks == 0


def _block(shape: ModelShape) -> list[Matrix]:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [
        Matrix(query, shape.dim, "rows"),
        *[Matrix(key, shape.dim, "rows")] * 2,
        Matrix(shape.dim, query, "columns"),
    ]
    inner = [Matrix(shape.ffn_dim, shape.dim, "rows")] * (2 if shape.gated else 1)
    norms = [Matrix(shape.dim, 1, "none")] * 2 + [Matrix(shape.head_dim, 1, "none")] * (2 if shape.qk_norm else 0)
    return [*attention, *inner, Matrix(shape.dim, shape.ffn_dim, "columns"), *norms]


def _held(shape: ModelShape, plan: Plan, stage: int) -> Iterator[Matrix]:
    """Parameters of a pipeline rank: its parts' blocks, and the tables at the ends."""
    table, block = Matrix(shape.vocab_size, shape.dim, "rows"), _block(shape)
    count = plan.pipeline * plan.interleave
    costs = [float(sum(matrix.size for matrix in block))] * shape.layers
    costs[0] += shape.dim  # a look-up
    costs[-1] += shape.dim + table.size
    for part, (start, stop) in enumerate(partition(costs, count)):
        if holder(part, plan.pipeline, plan.schedule or "") != stage:
            continue
        for _ in range(start, stop):
            yield from block
        if part == 0:
            yield table
        if part == count - 1:
            yield Matrix(shape.dim, 1, "none")
            if not shape.tied or count > 1:
                yield table
