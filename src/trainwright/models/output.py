"""What a language model's forward returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has no target."""


class LMOutput(NamedTuple):
    """Result of a forward pass of our models (and of `pretrained.PreShiftedCausalLM`).

    A named tuple, because torch's pytrees know it: the hooks of `fully_shard` see the tensors inside.

    loss: [] mean over the valid tokens, Σ token losses / max(valid, 1); fp32, or fp64 in an fp64 model.
    logits: [B, T, V], in the compute dtype; None when labels were given and logits not asked for.
    loss_sum: [] Σ token losses. tokens: [] valid tokens, int64.
    hidden: [B, T, D] the residual stream, from a module that holds the first layers only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_sum: Tensor | None = None
    tokens: Tensor | None = None
    hidden: Tensor | None = None
