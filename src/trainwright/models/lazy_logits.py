"""Logits that are made when somebody looks at them: a model of someone else's gets the fused loss, its code unchanged.

Such a model's forward projects to the vocabulary and hands the logits to a cross-entropy, with a cast, a view, a shift, a
scale or a soft cap on the way. What the head returns inside `lazy_logits()` goes along with all of these and arrives at
`torch.nn.functional.cross_entropy`, which then is `fused/cross_entropy.py`'s. Whatever else is done to it finds the
logits themselves.

D model, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trainwright.fused.cross_entropy import IGNORE_INDEX
from trainwright.models.head import head_loss

Rate = float  # the name `float` is a method's below
_wanted: ContextVar[bool] = ContextVar("trainwright_lazy_logits", default=False)
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


@contextmanager
def lazy_logits(wanted: bool = True) -> Iterator[None]:
    """Inside it the heads that `make_lazy` has prepared return `LazyLogits`: for whoever is after the loss alone."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def make_lazy(head: nn.Linear) -> None:
    """Prepares a projection to the vocabulary, in place."""
    head.forward = functools.partial(_forward, head, head.forward)  # type: ignore[method-assign]


def _forward(head: nn.Linear, project: Callable[[Tensor], Tensor], input: Tensor) -> Any:
    return LazyLogits(head, project, input, input) if _wanted.get() else project(input)


@dataclass(frozen=True, eq=False, repr=False)
class LazyLogits:
    """Stands for `done(project(source))` [..., V]. `hidden` [..., D] are the rows that are left of `source`, and what is
    left to do to their logits l is before·l, or after·tanh(before·l)."""

    head: nn.Linear
    project: Callable[[Tensor], Tensor]
    source: Tensor
    hidden: Tensor
    done: tuple[Callable[[Tensor], Tensor], ...] = ()
    before: Rate = 1.0
    after: Rate | None = None

    # --- what it goes along with -----------------------------------------------------------------------------------

    def _then(self, function: Callable[[Tensor], Tensor], **changes: Any) -> LazyLogits:
        return replace(self, done=(*self.done, function), **changes)

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        """As Tensor.to. The fused loss is in fp32 whatever this says."""
        return self._then(lambda t: t.to(*args, **kwargs))

    def float(self) -> LazyLogits:
        """As Tensor.float."""
        return self._then(Tensor.float)

    def contiguous(self) -> LazyLogits:
        """As Tensor.contiguous."""
        return self._then(Tensor.contiguous, hidden=self.hidden.contiguous())

    def view(self, *shape: Any) -> Any:
        """As Tensor.view; lazy where the vocabulary stays the last dimension."""
        return self._shaped(Tensor.view, shape)

    def reshape(self, *shape: Any) -> Any:
        """As Tensor.reshape; lazy where the vocabulary stays the last dimension."""
        return self._shaped(Tensor.reshape, shape)

    def _shaped(self, function: Callable[..., Tensor], shape: tuple[Any, ...]) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
        if not all(isinstance(size, int) for size in sizes) or -1 in sizes[-1:]:
            return function(self.logits, *shape)
        if sizes[-1] != self.shape[-1]:
            return function(self.logits, *shape)
        rows = self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1])
        return self._then(lambda t: function(t, sizes), hidden=rows)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """As Tensor.flatten; lazy where the vocabulary stays the last dimension."""
        if end_dim % self.ndim == self.ndim - 1:
            return self.logits.flatten(start_dim, end_dim)
        return self._then(lambda t: t.flatten(start_dim, end_dim), hidden=self.hidden.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        plain = all(part is Ellipsis or isinstance(part, int | slice) for part in parts)
        whole = len(parts) < self.ndim or parts[-1] == slice(None)
        if not plain or not whole or (Ellipsis in parts and parts[-1] not in (slice(None), Ellipsis)):
            return self.logits[index]
        return self._then(lambda t: t[index], hidden=self.hidden[index])

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, int | float):
            return self.logits * factor
        if self.after is not None:
            return self._then(lambda t: t * factor, after=self.after * factor)
        return self._then(lambda t: t * factor, before=self.before * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, int | float) or not divisor:
            return self.logits / divisor
        found = self * (1.0 / divisor)
        return replace(found, done=(*self.done, lambda t: t / divisor))

    def tanh(self) -> Any:
        """As Tensor.tanh."""
        return self.logits.tanh() if self.after is not None else self._then(Tensor.tanh, after=1.0)

    # --- what needs no values --------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """[..., V]."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As Tensor.dim."""
        return self.hidden.ndim

    ndim = property(dim)

    @property
    def dtype(self) -> torch.dtype:
        """The hidden states': what the loss is made from."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """The hidden states'."""
        return self.hidden.device

    # --- the end -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def logits(self) -> Tensor:
        """The tensor itself; from here on it is whole in memory."""
        logits = self.project(self.source)
        for function in self.done:
            logits = function(logits)
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            call = _CROSS_ENTROPY.bind(*args, **(kwargs or {}))
            call.apply_defaults()
            if isinstance(call.arguments["input"], cls):
                loss = call.arguments["input"]._cross_entropy(**call.arguments)
                if loss is not None:
                    return loss
        if func in (torch.tanh, Tensor.tanh) and isinstance(args[0], cls):
            return args[0].tanh()
        args, kwargs = tree_map_only(cls, lambda lazy: lazy.logits, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: Rate,
        **legacy: Any,
    ) -> Tensor | None:
        """The fused loss; None where it is not the same as F.cross_entropy's."""
        of_classes = not target.is_floating_point() and target.shape == self.hidden.shape[:-1]
        if any(old is not None for old in (legacy["size_average"], legacy["reduce"])):
            return None
        if weight is not None or label_smoothing or reduction not in ("sum", "mean") or not of_classes:
            return None
        if ignore_index != IGNORE_INDEX:
            target = target.masked_fill(target == ignore_index, IGNORE_INDEX)
        before = self.before if self.after is None else self.before * self.after
        hidden = self.hidden if math.isclose(before, 1.0) else self.hidden * before
        with lazy_logits(False):
            loss_sum, tokens = head_loss(hidden, self.head, target, softcap=self.after)
        return loss_sum / tokens if reduction == "mean" else loss_sum

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "logits":
            raise AttributeError(name)
        return getattr(self.logits, name)

    def __repr__(self) -> str:
        return f"LazyLogits{tuple(self.shape)}"

    def __len__(self) -> int:
        return self.shape[0]


def _on_logits(name: str) -> Callable[..., Any]:
    def method(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.logits, name)(*args)

    return method


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "rtruediv",
    "matmul",
    "pow",
    "neg",
    "lt",
    "le",
    "gt",
    "ge",
    "bool",
    "float",
    "iter",
):
    setattr(LazyLogits, f"__{_name}__", _on_logits(f"__{_name}__"))
