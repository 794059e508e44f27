"""Attention that stays inside the documents of a packed sequence: what each kind of model is told for it."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from trainwright.data.batch import Batch
from trainwright.errors import ModelError
from trainwright.models.pretrained import PreShiftedCausalLM, shifts_labels
from trainwright.models.transformer import Transformer


def document_inputs(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """Further inputs of a forward on `batch`; none where attention crosses documents. Raises ModelError as below."""
    if batch.position_ids is None:
        return {}
    check_document_mask(module)
    if isinstance(module, Transformer):
        assert batch.document_ids is not None, "positions in documents come with the documents' numbers"
        return {"document_ids": batch.document_ids}  # rotary positions count relative to one another
    return {"position_ids": batch.position_ids, "use_cache": False}  # with a cache to fill, positions mark no documents


def check_document_mask(module: nn.Module) -> None:
    """Raises ModelError for a model that cannot keep documents apart: a recurrent one, or one of Hugging Face's that
    does not make its mask from positions that start again (`create_causal_mask`)."""
    if isinstance(module, Transformer):
        return
    causal = isinstance(module, PreShiftedCausalLM) or shifts_labels(module)
    if causal and any(hasattr(sys.modules.get(b.__module__), "create_causal_mask") for b in type(module).__mro__):
        return
    raise ModelError(
        f"data.document_mask=true with {type(module).__name__}",
        "attention inside documents needs our Transformer, or a causal model of Hugging Face's that knows packed sequences; "
        "a recurrent layer carries its state on",
        "data.document_mask=false",
    )
