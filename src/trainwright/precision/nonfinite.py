"""Names the first module that produced a non-finite value, once the limit of skipped steps is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def first_bad_output(module: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first module (in order of execution) whose output in `forward()` is not finite on some rank.

    Collective: every rank calls it. Runs without gradients.
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
    return _first_over_ranks(bad[0] if bad else None)


def first_bad_gradient(pairs: Sequence[tuple[nn.Parameter, Tensor]], names: dict[int, str]) -> str | None:
    """Name of the first parameter, in the order of backward (the model's order reversed), with a non-finite gradient.

    `names` maps id(parameter) to its name. Collective.
    """
    for parameter, gradient in reversed(pairs):
        bad = torch.tensor([0.0 if bool(torch.isfinite(gradient).all()) else 1.0], device=gradient.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            return names.get(id(parameter), "?")
    return None


def _first_over_ranks(name: str | None) -> str | None:
    if dist.get_world_size() == 1:
        return name
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    for rank, found in enumerate(names):
        if found:
            return f"{found} (rank {rank})"
    return None
