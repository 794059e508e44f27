"""The phases of a training step, marked for torch's profiler (`monitor/profile.py` and any trace show them) and noted in
the ledger."""

from __future__ import annotations

from types import TracebackType

import torch

from trainwright.ledger import here

PREFIX = "trainwright."
STEP, DATA, FORWARD, BACKWARD, UPDATE = "step", "data", "forward", "backward", "update"
GRAPH = "graph"
"""All forwards and backwards of a step in one (`parallel/captured.py`)."""


class phase:
    """Marks what runs inside it."""

    __slots__ = ("_mark", "_note")

    def __init__(self, name: str) -> None:
        self._mark, self._note = torch.profiler.record_function(PREFIX + name), here.phase(name)

    def __enter__(self) -> None:
        self._note.__enter__()
        self._mark.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark.__exit__(kind, error, trace)
        self._note.__exit__(kind, error, trace)
