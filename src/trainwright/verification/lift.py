"""Lifts the float32 casts inside Hugging Face models to float64, so that a proof is not hidden by their rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class Float64(TorchFunctionMode):
    """Every request for float32 (`.float()`, `.to(torch.float32)`, `dtype=torch.float32`) becomes one for float64.

    A backward pass runs without it; recomputation takes the modes of its forward along (`parallel/recompute.py`)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()

        def lifted(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*tree_map(lifted, args), **tree_map(lifted, kwargs))
