"""From the config's batch words to the numbers of this job."""

from __future__ import annotations

from trainwright.config.data_schema import BatchConfig
from trainwright.data.batch import BatchPlan
from trainwright.errors import ContradictionError


def rows_and_accumulation(batch: BatchConfig, sequence_length: int, replicas: int) -> tuple[int | None, int]:
    """(rows of a micro-batch or None where the config leaves them to the caller, micro-batches a step).

    A global batch that does not divide is split as evenly as possible: rows are rounded up. Raises ContradictionError
    where three numbers are given that do not agree on `replicas`.
    """
    size = batch.global_size
    if size is None and batch.global_tokens is not None:
        size = batch.global_tokens // sequence_length
    if size is None:
        return batch.micro_size, batch.accumulation or 1
    rows = -(-size // replicas)
    if batch.micro_size is not None and batch.accumulation is not None:
        if batch.micro_size * batch.accumulation != rows:
            raise ContradictionError(
                f"batch.global_size={size}, micro_size={batch.micro_size}, accumulation={batch.accumulation} "
                f"on {replicas} data-parallel rank(s)",
                "global_size = micro_size x accumulation x data-parallel ranks; any two settle the third",
                f"leave accumulation out, or batch.global_size={batch.micro_size * batch.accumulation * replicas}",
            )
        return batch.micro_size, batch.accumulation
    if batch.micro_size is not None:
        micro_batches = -(-rows // batch.micro_size)
        # As few padded rows as that many micro-batches allow.
        return -(-rows // micro_batches), micro_batches
    micro_batches = batch.accumulation or 1
    return -(-rows // micro_batches), micro_batches


def share_of_group(batch: BatchConfig, sequence_length: int, groups: int) -> BatchConfig:
    """What one of `groups` groups has of the batch: sizes are over all groups, and divide (check_outer sees to it)."""
    size = batch.global_size or (batch.global_tokens // sequence_length if batch.global_tokens else None)
    if groups == 1 or size is None:
        return batch
    return batch.model_copy(update={"global_size": size // groups, "global_tokens": None})


def plan_batches(batch: BatchConfig, sequence_length: int, replicas: int) -> BatchPlan:
    """The whole plan for a loader. Raises ContradictionError where the config does not settle it."""
    rows, accumulation = rows_and_accumulation(batch, sequence_length, replicas)
    size = batch.global_size or (batch.global_tokens // sequence_length if batch.global_tokens else None)
    if rows is None:
        raise ContradictionError(
            f"a batch without a size (accumulation={batch.accumulation})",
            "two of global_size, micro_size and accumulation, or a size alone",
            "batch.global_size=64",
        )
    return BatchPlan(size or rows * accumulation * replicas, rows, accumulation)
