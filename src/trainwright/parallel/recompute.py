"""Activation recomputation: keep a block's input, run its forward again in backward (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_recompute(units: Sequence[tuple[str, nn.Module]]) -> None:
    """Every unit's forward under `checkpoint` while training.

    The module's forward is replaced, not wrapped in another module, so that parameter names stay what they are.
    """
    for _, module in units:
        original = module.forward

        def forward(*args: Any, _module: nn.Module = module, _original: Any = original, **kwargs: Any) -> Any:
            if not _module.training:
                return _original(*args, **kwargs)
            return checkpoint(_original, *args, use_reentrant=False, **kwargs)

        module.forward = functools.wraps(original)(forward)
