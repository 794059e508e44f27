"""Losses for the user's own loops: `tw.losses.cross_entropy`."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainwright.fused.cross_entropy import IGNORE_INDEX

__all__ = ["cross_entropy"]


def cross_entropy(logits: Float[Tensor, "*batch V"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the valid labels (not -100), computed in fp32 (fp64 for fp64 logits); 0 when there are
    none, with zero gradients, where torch's would be NaN.

    labels: the target of each position, already shifted.
    """
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    flat = labels.reshape(-1)
    total = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), flat, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (flat != IGNORE_INDEX).sum().clamp(min=1)
