"""`trainwright export`: a run's weights as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright import distributed
from trainwright.checkpoint.export import export_huggingface
from trainwright.inference import OpenRun
from trainwright.precision.policy import DTYPES


def export_run(run: OpenRun, out: str | Path, dtype: str | None = None) -> list[str]:
    """Writes model, config and tokenizer to `out`; returns the files' names (empty but on rank 0). Collective.

    dtype: of the files, default fp32, the masters' own. Gathers one tensor at a time.
    """
    tensors = _whole_tensors(run)
    if not distributed.is_main():
        for _ in tensors:  # each gather is collective
            pass
        return []
    return export_huggingface(
        run.model.module, tensors, out, None if dtype is None else DTYPES[dtype], run.dataset.tokenizer_path.parent
    )


def _whole_tensors(run: OpenRun) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in run.model.state():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
