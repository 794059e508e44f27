"""Losses for training loops of one's own: `tw.losses.cross_entropy`."""

from trainwright.fused.cross_entropy import cross_entropy, linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
