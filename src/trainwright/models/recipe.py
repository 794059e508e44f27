"""How a tensor of a model on the meta device gets its initial values: a replayable list of operations.

A recipe that touches its tensor row by row (fills, elementwise arithmetic, independent draws) is replayed for fixed
blocks of rows, each with a generator keyed by (seed, name, block): a shard makes only the blocks it needs, and no
layout changes a value. Anything else (orthogonal_, copies from another tensor) is replayed whole, then cut.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.torch_private import tree_map_only

_BLOCK_ELEMENTS = 1 << 16
# In-place operations whose effect on some rows does not depend on the other rows.
_OVERWRITES = frozenset({"normal_", "uniform_", "fill_", "zero_", "_no_grad_trunc_normal_"})
_ROWWISE = _OVERWRITES | {
    *("exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_", "random_"),
    *("mul_", "add_", "sub_", "div_", "pow_", "clamp_", "clamp_min_", "clamp_max_"),
    *("erfinv_", "exp_", "log_", "sqrt_", "abs_", "neg_", "tanh_"),
}


@dataclass(frozen=True)
class View:
    """A strided window onto storage number `storage` of a tape."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def rows_of(self, whole: View) -> slice | None:
        """The rows of `whole` (contiguous) that this is, or None when it is not made of whole rows."""
        row = math.prod(whole.size[1:])
        numel = math.prod(self.size)
        if row == 0 or self.offset % row or numel % row or self.stride != _contiguous_strides(self.size):
            return None
        if self.size[1:] != whole.size[1:] and self.size != whole.size[1:]:
            return None
        return slice(self.offset // row, (self.offset + numel) // row)


def _contiguous_strides(size: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(size)
    for axis in range(len(size) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(size[axis + 1], 1)
    return tuple(strides)


@dataclass(frozen=True)
class Step:
    """An operation: tensors in `args` and `kwargs` are `View`s; `outs` are the tensors that it creates."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    outs: tuple[View, ...] = ()

    @property
    def name(self) -> str:
        packet = getattr(self.function, "overloadpacket", self.function)
        return str(packet.__name__)


@dataclass(frozen=True)
class Recipe:
    """What makes one tensor: the storages' first values, then the steps, in order. `order` numbers each step on the
    tape; it keys the draws of a recipe that is replayed whole."""

    view: View
    first_values: dict[int, float | Tensor]
    steps: tuple[Step, ...]
    order: tuple[int, ...]
    sizes: dict[int, int]
    shared: bool = False

    @property
    def empty(self) -> bool:
        """Whether the constructor left the tensor without values."""
        return not self.steps and not self.first_values

    @property
    def by_rows(self) -> bool:
        view = self.view
        if self.shared or set(self.sizes) != {view.storage} or not view.size or not view.dtype.is_floating_point:
            return False
        if view.offset or view.stride != _contiguous_strides(view.size):
            return False
        return all(self._row_step(step) is not None for step in self.steps)

    def _row_step(self, step: Step) -> slice | None:
        target = step.args[0] if step.args else step.kwargs.get("tensor")
        if step.name not in _ROWWISE or step.outs or not isinstance(target, View):
            return None
        others = [*step.args[1:], *(value for key, value in step.kwargs.items() if key != "tensor")]
        if any(isinstance(other, View | Tensor) for other in others):
            return None
        return target.rows_of(self.view)

    def rows(self, seed: int, name: str, rows: slice) -> Tensor:
        """Rows [start, stop) of the initial values, in fp32 (other dtypes than floats as they are), on the CPU.

        Uses and moves torch's global CPU generator: the caller keeps and restores its state.
        """
        if not self.by_rows:
            whole = self._replay_whole(seed)
            return whole if not self.view.size else whole[rows]
        size = self.view.size
        block_rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(size[1:])))
        parts = []
        for block in range(rows.start // block_rows, -(-rows.stop // block_rows)):
            first, last = block * block_rows, min((block + 1) * block_rows, size[0])
            values = self._replay_block(seed, name, block, first, last)
            parts.append(values[max(rows.start - first, 0) : rows.stop - first])
        return torch.cat(parts) if parts else torch.empty(0, *size[1:])

    def _replay_block(self, seed: int, name: str, block: int, first: int, last: int) -> Tensor:
        values = torch.zeros(last - first, *self.view.size[1:])
        start = self.first_values.get(self.view.storage)
        if isinstance(start, Tensor):
            values.copy_(start.view(self.view.size)[first:last])
        elif start is not None:
            values.fill_(start)
        _seed(seed, name, block)
        for step, rows in self._live_row_steps():
            part = values[max(rows.start - first, 0) : max(min(rows.stop, last) - first, 0)]
            if len(part) == 0:
                continue
            if step.args:
                step.function(part, *step.args[1:], **step.kwargs)
            else:
                step.function(**{**step.kwargs, "tensor": part})
        return values

    def _live_row_steps(self) -> list[tuple[Step, slice]]:
        """The steps from the last one that overwrites all: a constructor's first draw is often drawn over."""
        live: list[tuple[Step, slice]] = []
        for step in self.steps:
            rows = self._row_step(step)
            assert rows is not None, f"{step.name} does not work row by row"
            if step.name in _OVERWRITES and rows == slice(0, self.view.size[0]):
                live = []
            live.append((step, rows))
        return live

    def _replay_whole(self, seed: int) -> Tensor:
        flats: dict[int, Tensor] = {}

        def real(view: View) -> Tensor:
            if view.storage not in flats:
                flat = torch.zeros(self.sizes[view.storage], dtype=_wide(view.dtype))
                start = self.first_values.get(view.storage)
                if start is not None:
                    flat.copy_(start.reshape(-1)) if isinstance(start, Tensor) else flat.fill_(start)
                flats[view.storage] = flat
            return flats[view.storage].as_strided(view.size, view.stride, view.offset)

        for number, step in zip(self.order, self.steps, strict=True):
            _seed(seed, "step", number)
            args, kwargs = tree_map_only(View, real, (step.args, step.kwargs))
            args, kwargs = tree_map_only(torch.dtype, _wide, (args, kwargs))
            result = step.function(*args, **kwargs)
            results = result if isinstance(result, tuple | list) else (result,)
            for view, value in zip(step.outs, results, strict=False):
                real(view).copy_(value)
        return real(self.view).clone()


def _wide(dtype: torch.dtype) -> torch.dtype:
    # Draws are made in fp32 whatever the model's format, so that runs in all formats start from the same values.
    return torch.float32 if dtype.is_floating_point else dtype


def _seed(seed: int, name: str, number: int) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
