"""Which layers each pipeline part holds.

Layers are balanced by what they compute: a multiplication for each entry of each matrix and token; a look-up costs its
width. The head counts like any matrix (attention's products of queries and keys, alike in all blocks, do not).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ModelError
from trainwright.parallel.pipeline.layout import Layout, Piece

Group = list[Piece]
"""The pieces of one part."""


def group_pieces(model: nn.Module, layout: Layout, count: int, settings: ParallelConfig) -> list[Group]:
    """The pieces of each part. Modules around the blocks go with the nearest one."""
    items: list[Group] = []
    before: Group = []
    for piece in layout.pieces:
        if piece.is_block:
            items.append([*before, piece])
            before = []
        elif items:
            items[-1].append(piece)
        else:
            before.append(piece)
    if len(items) < count:
        works = max(
            (n for n in range(1, settings.pipeline + 1) if n * (count // settings.pipeline) <= len(items)), default=1
        )
        raise ModelError(
            f"parallel.pipeline={settings.pipeline}"
            + (f" with {count // settings.pipeline} parts a rank" if count > settings.pipeline else "")
            + f" on {type(model).__name__} with {len(items)} block{'s' if len(items) > 1 else ''}",
            f"each of the {count} parts holds a block at least",
            f"parallel.pipeline={works}"
            + (", or parallel.pipeline_schedule=1f1b" if count > settings.pipeline else ""),
        )
    costs = [sum(cost(model.get_submodule(name)) for piece in item for name in piece.names) for item in items]
    groups = []
    for start, stop in partition(costs, count):
        groups.append([piece for item in items[start:stop] for piece in item])
    return groups


def cost(module: nn.Module) -> float:
    """Multiplications a token of the module's forward: the entries of its parameters; a row for a look-up."""
    total = 0
    for inner in module.modules():
        for parameter in inner.parameters(recurse=False):
            total += parameter.shape[-1] if isinstance(inner, nn.Embedding) else parameter.numel()
    return float(total)


def partition(costs: Sequence[float], count: int) -> list[tuple[int, int]]:
    """Cuts `costs` into `count` runs [start, stop), none empty: the dearest as cheap as can be, the others then as
    even as can be (the least sum of squares)."""
    total = [0.0]
    for value in costs:
        total.append(total[-1] + value)

    def best(limit: float | None) -> tuple[float, list[tuple[int, int]]]:
        # score[k][i]: the first i costs in k runs; (score, start of the last run)
        size = len(costs)
        score = [[(float("inf"), 0)] * (size + 1) for _ in range(count + 1)]
        score[0][0] = (0.0, 0)
        for k in range(1, count + 1):
            for i in range(k, size + 1):
                for j in range(k - 1, i):
                    run = total[i] - total[j]
                    if limit is not None and run > limit:
                        continue
                    value = max(score[k - 1][j][0], run) if limit is None else score[k - 1][j][0] + run * run
                    if value < score[k][i][0]:
                        score[k][i] = (value, j)
        runs, stop = [], size
        for k in range(count, 0, -1):
            start = score[k][stop][1]
            runs.append((start, stop))
            stop = start
        return score[count][size][0], runs[::-1]

    dearest, _ = best(None)
    return best(dearest * (1 + 1e-12))[1]
