"""`trainwright export`: a run's weights as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright import distributed
from trainwright.checkpoint.export import export_huggingface
from trainwright.inference import OpenRun
from trainwright.models.pretrained import resolve_folder
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
    config = run.resolved.config.model
    # A fine-tuned model keeps all of its tokenizer's files (chat template, special tokens), not tokenizer.json alone.
    named = config.huggingface if config is not None else None
    tokenizer = resolve_folder(named) if named is not None else run.dataset.tokenizer_path.parent
    return export_huggingface(run.model.module, tensors, out, None if dtype is None else DTYPES[dtype], tokenizer)


def _whole_tensors(run: OpenRun) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in run.model.state():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
