"""What torch's autograd tells of a backward pass, and lets be done with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def after_backward(callback: Callable[[], None]) -> None:
    """Runs `callback` when the backward pass that is under way is over. Checked on 2.13; FSDP2 itself stands on it."""
    from torch.autograd import Variable

    Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether the calling code runs inside a backward pass. Checked on 2.13; when it goes: hooks on the loss."""
    import torch

    return torch._C._current_graph_task_id() != -1


def keeps_graph() -> bool:
    """Whether the backward that runs keeps its graph for another one (`retain_graph=True`). Checked on 2.13; when it
    goes: answer True, which costs a copy."""
    import torch

    asks = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asks is None else bool(asks())


@cache
def parts_backwards() -> bool:
    """Whether torch can part a backward in two (zero-bubble schedules) where the halves meet in an autograd.Function written
    in Python, as ours are: it reads the node's `_input_metadata`, which 2.11 does not give. Checked on 2.11 and 2.13."""
    import torch

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    try:
        return Same.apply(torch.zeros((), requires_grad=True)).grad_fn._input_metadata is not None
    except (AttributeError, RuntimeError):
        return False
