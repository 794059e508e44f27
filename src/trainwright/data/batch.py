"""The batch that a replica trains on, and the numbers that a global batch is cut by.

Legend: B rows (sequences) on this replica, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int64
from torch import Tensor

from trainwright.errors import ConfigError, UsageError

__all__ = ["IGNORE_INDEX", "Batch", "BatchPlan"]

IGNORE_INDEX = -100
"""The label that is not counted: PyTorch's default `ignore_index`."""


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: `global_size` sequences a step; each replica runs `accumulation` micro-batches of
    `micro_size` rows. The plan must have room for every row: global_size <= replicas x accumulation x micro_size
    (checked where the number of replicas is known)."""

    global_size: int
    micro_size: int
    accumulation: int
    group: int = 0
    """Which group of ranks, of `groups` that train by themselves (`outer`): all other numbers are of one group."""
    groups: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if field.name == "group" else 1):
                raise ConfigError(
                    f"batch plan with {field.name} = {value!r}",
                    "the sizes of a batch are whole numbers from 1 up",
                    f"set {field.name} to 1 or more",
                )

    @property
    def stride(self) -> int:
        """Samples of a step over all groups: what the position in the order of the data advances by."""
        return self.global_size * self.groups

    @property
    def first_of_group(self) -> int:
        """The first of the group's samples, counted from the step's position."""
        return self.global_size * self.group

    @property
    def rows(self) -> int:
        """Rows of a replica's batch, padding included: accumulation x micro_size."""
        return self.accumulation * self.micro_size

    def row_range(self, replica: int, replicas: int) -> tuple[int, int]:
        """Rows [start, stop) of the global batch on `replica` of `replicas`: contiguous, sizes differ by <= 1."""
        base, extra = divmod(self.global_size, replicas)
        start = replica * base + min(replica, extra)
        stop = start + base + (1 if replica < extra else 0)
        if stop - start > self.rows:
            needed = -(-self.global_size // (replicas * self.micro_size))
            raise ConfigError(
                f"{self.global_size} sequences a step on {replicas} replicas with micro_size {self.micro_size} "
                f"and accumulation {self.accumulation}",
                "global_size <= replicas x accumulation x micro_size",
                f"batch.accumulation={needed}",
            )
        return start, stop

    def padded_rows(self, replicas: int) -> int:
        """Rows a step that compute nothing, over all replicas: the waste of an uneven split."""
        return replicas * self.rows - self.global_size


@dataclass(frozen=True)
class Batch:
    """This replica's share of a global batch, padding rows included.

    `input_ids` and `labels` are [B, T] int64; `labels` are shifted already: labels[b, t] is the token to predict from
    position t, or -100 where nothing counts (masked prompts, padded rows). `document_ids` [B, T] int64 number the
    documents that a packed sequence holds, or None. `sample_ids` [B] int64 is the index of each sequence in its
    split, -1 for padded rows. `position` is the global sample position of the global batch's first sequence.
    `position_ids` [B, T] int64 is each token's place in its document, given where attention is to stay inside documents.
    """

    input_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    document_ids: Int64[Tensor, "B T"] | None
    sample_ids: Int64[Tensor, " B"]
    position: int
    position_ids: Int64[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        assert self.input_ids.ndim == 2, f"input_ids must be [B, T], got {tuple(shape)}"
        assert self.labels.shape == shape, f"labels {tuple(self.labels.shape)} differ from input_ids {tuple(shape)}"
        assert self.sample_ids.shape == shape[:1], f"sample_ids must be [B], got {tuple(self.sample_ids.shape)}"
        assert self.document_ids is None or self.document_ids.shape == shape, "document_ids must be [B, T] or None"

    @property
    def size(self) -> int:
        """Rows, B."""
        return self.input_ids.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens a row, T."""
        return self.input_ids.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `function` of each of its tensors."""
        return Batch(
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            document_ids=None if self.document_ids is None else function(self.document_ids),
            sample_ids=function(self.sample_ids),
            position=self.position,
            position_ids=None if self.position_ids is None else function(self.position_ids),
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on `device`. Copies from pinned memory (`pin_memory`) do not make the host wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies on its own. CUDA only."""
        return self.map(lambda tensor: tensor.pin_memory())

    def split(self, micro_size: int) -> list[Batch]:
        """Micro-batches of `micro_size` rows each, views of this batch. Raises UsageError if B does not divide."""
        if micro_size < 1 or self.size % micro_size:
            raise UsageError(
                f"a batch of {self.size} rows cut into micro-batches of {micro_size}",
                "micro_size divides the rows of a replica's batch (the loader pads them so)",
                f"micro_size={self.size}",
            )
        return [self._rows(start, start + micro_size) for start in range(0, self.size, micro_size)]

    def _rows(self, start: int, stop: int) -> Batch:
        return self.map(lambda tensor: tensor[start:stop])

    def valid_tokens(self) -> Int64[Tensor, ""]:
        """Number of labels that count, a 0-dim int64 tensor on the batch's device (the host does not wait)."""
        return (self.labels != IGNORE_INDEX).sum()
