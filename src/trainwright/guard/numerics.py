"""Where values stopped being finite: the first module, the first parameter, the ranks, the samples.

Found by running the step's forward once more, without gradients, on the weights that it was made with: a step whose
gradient is not finite changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainwright.position import of_ranks

_MOST_ROWS = 64


@dataclass(frozen=True)
class Finding:
    """What is known of a step whose gradient was not finite; the same on all ranks."""

    module: str | None
    """The first whose output was not finite, on the first rank that had one; None where all outputs were."""
    parameter: str | None
    """Without such a module: the first gradient, in the order of backward, that was not."""
    ranks: tuple[int, ...]
    """Where an output was not finite."""
    samples: tuple[tuple[int, int], ...]
    """(rank, sample) of the sequences whose own loss was not."""
    of: str = ""
    """What was looked at, where it was not the whole step."""

    def describe(self) -> str:
        """Such as "first non-finite output: module blocks.3 (rank 1); samples 12 (rank 1), 99 (rank 1)"."""
        if self.module is None:
            where = f" {self.of}" if self.of else ""
            return f"every module's output{where} is finite; first non-finite gradient, in the order of backward: {self.parameter}"
        size = dist.get_world_size()
        where = "" if size == 1 else f" ({'all ranks' if len(self.ranks) == size else of_ranks(list(self.ranks))})"
        text = f"first non-finite output: module {self.module}{where}"
        if self.samples:
            shown = ", ".join(
                f"{sample}" + (f" (rank {rank})" if size > 1 else "") for rank, sample in self.samples[:8]
            )
            more = f" and {len(self.samples) - 8} more" if len(self.samples) > 8 else ""
            text += f"; sample{'s' if len(self.samples) > 1 else ''} {shown}{more}"
        return text


@dataclass(frozen=True)
class Replay:
    """A step's forward, to be run again. `rows` gives its sequences one by one, (the sample's number, a micro-batch of it),
    and `loss` one's loss, with a `sum`; none where the batch has no such numbers."""

    module: nn.Module
    forward: Callable[[], Any]
    rows: Callable[[], Sequence[tuple[int, Any]]] | None = None
    loss: Callable[[Any], Any] | None = None
    of: str = ""
    """What part of the step it is, where it is not all."""


def find(replay: Replay, pairs: Sequence[tuple[nn.Parameter, Tensor]], names: dict[int, str]) -> Finding:
    """Looks for the first module, or else the first gradient. Collective. names: id(parameter) -> name."""
    bad = first_bad_output(replay.module, replay.forward)
    everywhere = _from_all(bad)
    ranks = tuple(rank for rank, found in enumerate(everywhere) if found)
    if not ranks:
        return Finding(None, first_bad_gradient(pairs, names), (), (), replay.of)
    return Finding(everywhere[ranks[0]], None, ranks, _bad_samples(replay), replay.of)


def first_bad_output(module: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first module (in order of execution) whose output in `forward()` is not finite on this rank.

    Collective where the forward is. Runs without gradients.
    """
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if bad:
                return
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                    bad.append(name or "the whole model")
                    return

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in module.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None


def first_bad_gradient(pairs: Sequence[tuple[nn.Parameter, Tensor]], names: dict[int, str]) -> str | None:
    """Name of the first parameter, in the order of backward (the model's order reversed), with a non-finite gradient.

    `names` maps id(parameter) to its name, in the model's order. Of ranks that hold other parameters (a pipeline's), the
    last rank's that has one: its layers come first in backward. Collective.
    """
    bad = next((p for p, gradient in reversed(pairs) if not bool(torch.isfinite(gradient).all())), None)
    order = list(names)
    mine = None if bad is None else (order.index(id(bad)) if id(bad) in names else -1, names.get(id(bad), "?"))
    found = [told for told in _from_all(mine) if told is not None]
    same_parameters = len(set(_from_all(tuple(names.values())))) == 1
    return (max(found) if same_parameters else found[-1])[1] if found else None


def _bad_samples(replay: Replay) -> tuple[tuple[int, int], ...]:
    """Every rank runs as many rows: they come from one plan, and padded ones are among them."""
    mine: list[int] = []
    if replay.loss is not None and replay.rows is not None:
        rows = replay.rows()
        with torch.no_grad():
            for sample, row in rows if len(rows) <= _MOST_ROWS else ():
                if not bool(torch.isfinite(replay.loss(row).sum)) and sample >= 0:
                    mine.append(sample)
    return tuple((rank, sample) for rank, found in enumerate(_from_all(mine)) for sample in found)


def _from_all(value: Any) -> list[Any]:
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
