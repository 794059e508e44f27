"""The phases of a training step, marked for torch's profiler: `monitor/profile.py` and any trace show them."""

from __future__ import annotations

import torch

PREFIX = "trainwright."
STEP, DATA, FORWARD, BACKWARD, UPDATE = "step", "data", "forward", "backward", "update"


def phase(name: str) -> torch.profiler.record_function:
    """A context manager that marks what runs inside it."""
    return torch.profiler.record_function(PREFIX + name)
