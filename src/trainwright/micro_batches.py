"""From a replica's batch to its micro-batches, and from a micro-batch to the sum of its token losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trainwright.data.batch import Batch
from trainwright.errors import UsageError
from trainwright.fused.cross_entropy import summed_cross_entropy
from trainwright.models.build import is_ours
from trainwright.models.documents import document_inputs
from trainwright.models.lazy_logits import lazy_logits
from trainwright.models.pretrained import PreShiftedCausalLM, count_valid_tokens, shifts_labels
from trainwright.models.sequence import active_slice
from trainwright.normaliser import unmask_one_if_empty
from trainwright.parallel.parallel_model import LossSum


def cut(batch: Batch | dict[str, Any], count: int, device: torch.device) -> list[Any]:
    """`count` micro-batches on `device`. Raises UsageError where the rows do not allow it."""
    if isinstance(batch, Batch):
        if batch.size % count:
            raise _rows_error(batch.size, count)
        return batch.to(device).split(batch.size // count)
    tensors: dict[str, Any] = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
    rows = {len(v) for v in tensors.values() if isinstance(v, Tensor) and v.ndim}
    if len(rows) != 1 or min(rows) < count:
        raise _rows_error(min(rows, default=0), count)
    parts = {k: v.tensor_split(count) if isinstance(v, Tensor) and v.ndim else [v] * count for k, v in tensors.items()}
    return [{key: values[i] for key, values in parts.items()} for i in range(count)]


def numbered_rows(micro_batches: Sequence[Any]) -> list[tuple[int, Any]]:
    """(number of the sample, -1 for padding; a micro-batch of it alone), where the batch knows its samples' numbers."""
    return [
        (int(row.sample_ids[0]), row)
        for micro_batch in micro_batches
        if isinstance(micro_batch, Batch)
        for row in micro_batch.split(1)
    ]


def _rows_error(rows: int, count: int) -> UsageError:
    return UsageError(
        f"a batch of {rows} rows for {count} micro-batches",
        "train_batch takes this replica's share of the global batch: all tensors with one number of rows, "
        "batch.accumulation micro-batches of them",
        f"{max(1, rows // count) * count} rows, or batch.accumulation=1",
    )


def label_count(micro_batch: Any) -> int:
    """Labels of a micro-batch, valid or not; 1 where it has none."""
    labels = micro_batch.labels if isinstance(micro_batch, Batch) else micro_batch.get("labels")
    return labels.numel() if isinstance(labels, Tensor) else 1


def micro_batch_loss(module: nn.Module, micro_batch: Batch | dict[str, Any]) -> LossSum:
    """Forward of one micro-batch. Our models give the sum themselves; any other model's mean is multiplied by its count.

    A model without `labels` among its inputs counts as one token a micro-batch.
    """
    if isinstance(micro_batch, Batch):
        inputs: dict[str, Any] = {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels}
        inputs |= document_inputs(module, micro_batch)
    else:
        inputs = dict(micro_batch)
    labels = inputs.get("labels")
    of_slice = active_slice() is not None and not _gives_sum(module)
    if isinstance(labels, Tensor) and (of_slice or (isinstance(micro_batch, Batch) and shifts_labels(module))):
        # A Batch's labels are shifted already, and so are those of a slice of the sequence; a user's own Hugging Face
        # causal model would shift them again.
        del inputs["labels"]
        with lazy_logits():
            logits = module(**inputs).logits
        return LossSum.of(*summed_cross_entropy(logits, labels))
    count: Tensor | None = None
    if isinstance(labels, Tensor):
        count = count_valid_tokens(module, labels)
        if not _gives_sum(module):
            inputs["labels"] = unmask_one_if_empty(labels, count)
    with lazy_logits():
        output = module(**inputs)
    loss_sum = getattr(output, "loss_sum", None)
    if loss_sum is not None:
        return LossSum.of(loss_sum, output.tokens)
    loss = _find_loss(output)
    count = torch.ones((), device=loss.device) if count is None else count
    return LossSum.of(loss.to(torch.promote_types(loss.dtype, torch.float32)) * count, count)


def _gives_sum(module: nn.Module) -> bool:
    """Our models, and Hugging Face's as we build them: a batch without valid tokens gives them 0, not NaN."""
    return is_ours(module) or isinstance(module, PreShiftedCausalLM)


def _find_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        loss = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(
            f"the model's forward returned {type(output).__name__} without a loss",
            "train_batch needs the loss: a tensor of one number, `.loss`, ['loss'], or the first of a tuple",
            "return the loss from forward(labels=...), or use forward / backward / step",
        )
    return loss
