"""What a rank's operators compute, by kind and size: what a model of a machine's speed adds up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainwright.torch_private import tree_leaves


@dataclass(frozen=True)
class Work:
    """One operator in one size."""

    kind: str
    """product, attention, attention backward, softmax, activation, lookup, update or elementwise (all others that move bytes)."""
    dtype: str
    """Of the largest operand, such as float32."""
    sizes: tuple[int, ...]
    """product: (matrices, m, n, k) of [m, k] x [k, n]; attention: (rows x heads, queries, keys, head size); others: (bytes read
    and written,)."""

    @property
    def flops(self) -> float:
        """Of products and attention over all pairs; 0 for others."""
        if self.kind == "product":
            return 2.0 * math.prod(self.sizes)
        if self.kind.startswith("attention"):
            return (4.0 if self.kind == "attention" else 10.0) * math.prod(self.sizes)
        return 0.0


_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Operator -> where its two matrices stand among the arguments."""
_FREE = frozenset(  # views, and what allocates without writing
    [
        *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "detach", "as_strided", "alias", "split"),
        *("split_with_sizes", "unsqueeze", "squeeze", "expand", "slice", "select", "narrow", "unbind", "chunk", "set_"),
        *("promote_types", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
        *("record_stream", "lift_fresh", "_local_scalar_dense"),
    ]
)
_SOFTMAX = ("softmax", "log_softmax", "logsumexp", "exp")
_ACTIVATIONS = ("silu", "gelu", "sigmoid", "tanh", "erf", "cos", "sin", "log", "mish", "softplus")
_LOOKUPS = ("embedding", "gather", "index_select", "index", "scatter", "index_add", "index_put", "scatter_add", "take")
_MOVES_DATA = ("aten", "fsdp", "prims", "quantized", "trainwright")


class WorkLog:
    """Counts the work among the operators that are shown to it."""

    def __init__(self) -> None:
        self.counts: Counter[Work] = Counter()

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """One call of an operator; views and collectives have no work."""
        if operator.namespace not in _MOVES_DATA:
            return
        name = operator._schema.name.split("::")[1]
        if name in _FREE:
            return
        work = _work(name, args, kwargs, result)
        if work is not None:
            self.counts[work] += 1


def _work(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Work | None:
    if name in _PRODUCTS:
        left, right = (args[i] for i in _PRODUCTS[name])
        *batch, m, k = left.shape
        return Work("product", _dtype(left), (math.prod(batch), m, right.shape[-1], k))
    if name.startswith("product_attention") or "scaled_dot_product" in name:
        backward = name.endswith("backward")
        query, key = args[1:3] if backward else args[:2]
        rows, heads, length, size = query.shape
        return Work(
            "attention backward" if backward else "attention",
            _dtype(query),
            (rows * heads, length, key.shape[-2], size),
        )
    inputs = [leaf for leaf in tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})) if _real(leaf)]
    results = [leaf for leaf in tree_leaves(result) if _real(leaf)]
    if not inputs and not results:
        return None
    bare = name.removeprefix("_").removesuffix("_")
    kind = _kind(bare)
    if kind == "lookup" and "backward" not in bare:  # the table is not read as a whole
        moved = sum(map(_bytes, results)) if not bare.startswith(("scatter", "index_put", "index_add")) else 0
        moved = 2 * moved or 2 * min(_bytes(leaf) for leaf in inputs)
    else:
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, results or _written(kwargs)))
    return Work(kind, _dtype(max([*inputs, *results], key=_bytes)), (moved,)) if moved else None


def _kind(bare: str) -> str:
    if bare.startswith("fused_"):
        return "update"
    if bare.startswith(_SOFTMAX):
        return "softmax"
    if any(word in bare for word in _ACTIVATIONS):
        return "activation"
    return "lookup" if bare.startswith(_LOOKUPS) else "elementwise"


def _written(kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(kwargs.get("out")) if _real(leaf)]


def _real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
