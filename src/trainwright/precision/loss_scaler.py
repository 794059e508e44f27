"""The loss scale of fp16 training: static, or dynamic by DeepSpeed's rule.

Dynamic: an overflow uses up one hysteresis credit; without credit left, the scale halves (never below the minimum).
After `window` finite steps in a row the scale doubles and the credit is restored.
(DeepSpeed, `DynamicLossScaler`; Micikevicius et al., arXiv 1710.03740.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainwright.config.schema import LossScale, PrecisionConfig


@dataclass
class LossScaler:
    """`scale` multiplies the loss. `settings` is None for a static scale."""

    scale: float
    settings: LossScale | None = None
    finite_steps: int = 0
    credit: int = field(default=0)

    def __post_init__(self) -> None:
        if self.settings is not None and self.credit == 0:
            self.credit = self.settings.hysteresis

    @property
    def at_minimum(self) -> bool:
        """Whether another overflow could not lower the scale."""
        return self.settings is None or self.scale <= self.settings.minimum

    def update(self, overflow: bool) -> None:
        """Takes note of one step's outcome, the same on every rank."""
        if self.settings is None:
            return
        if overflow:
            self.finite_steps = 0
            if self.credit > 1:
                self.credit -= 1
            else:
                self.scale = max(self.scale / 2.0, self.settings.minimum)
            return
        self.finite_steps += 1
        if self.finite_steps % self.settings.window == 0:
            self.scale *= 2.0
            self.credit = self.settings.hysteresis

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {"scale": self.scale, "finite_steps": self.finite_steps, "credit": self.credit}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes a checkpoint's state; a static scale stays what the config says."""
        if self.settings is not None and state.get("credit"):
            self.scale = float(state["scale"])
            self.finite_steps = int(state["finite_steps"])
            self.credit = int(state["credit"])


def build_loss_scaler(config: PrecisionConfig) -> LossScaler:
    """Scale 1 for everything but fp16."""
    if config.dtype != "fp16":
        return LossScaler(1.0)
    if isinstance(config.loss_scale, float):
        return LossScaler(config.loss_scale)
    settings = config.loss_scale or LossScale()
    return LossScaler(settings.initial, settings)
