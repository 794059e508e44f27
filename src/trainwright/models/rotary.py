"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864). T sequence, E head width. Turning: `fused.elementwise.rotate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary position tables in fp32, made from integer positions where they are used.

    They are neither arguments of the blocks (`fully_shard` casts float arguments to the compute dtype) nor buffers
    (a model built on the meta device would have to fill them again). One instance serves all blocks.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.cos: Tensor | None = None  # [positions, E/2]
        self.sin: Tensor | None = None

    def prepare(self, positions: int, device: torch.device) -> None:
        """Makes the tables reach `positions`. Called by the model's forward, before the blocks read them."""
        cos = self.cos
        if cos is not None and cos.shape[0] >= positions and cos.device == device:
            return
        length = 1 << max(positions - 1, 63).bit_length()
        # A table made while generating (inference mode) must serve training later.
        with torch.inference_mode(False), torch.no_grad():
            exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
            angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), self.theta**-exponent)
            self.cos, self.sin = angle.cos(), angle.sin()

    def tables(self, first: int, length: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, E/2] for positions first..first+T-1, or [B, T, 1, E/2] for `position_ids` [B, T]."""
        assert self.cos is not None, "Rotary.prepare was not called"
        assert self.sin is not None, "Rotary.prepare was not called"
        if position_ids is not None:
            return self.cos[position_ids].unsqueeze(-2), self.sin[position_ids].unsqueeze(-2)
        rows = slice(first, first + length)
        return self.cos[rows].unsqueeze(-2), self.sin[rows].unsqueeze(-2)
