"""The global batches that both sides train on, whole for the reference, a replica's rows for a rank.

Legend: B rows of a global batch, T tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int64
from torch import Tensor

from trainwright.config import Config
from trainwright.data.batch import IGNORE_INDEX, Batch, BatchPlan
from trainwright.data.loader import TokenLoader, document_positions
from trainwright.data.mix import open_dataset
from trainwright.data.plan import plan_batches
from trainwright.errors import UsageError

MASKED_SHARE = 0.4
"""Labels of a synthetic batch that are ignored, so that ranks and micro-batches hold different numbers of tokens."""


class GlobalData(Protocol):
    """Where the batches come from."""

    @property
    def steps(self) -> int:
        """Batches there are."""
        ...

    @property
    def size(self) -> int:
        """Rows of a global batch, B."""
        ...

    def whole(self, step: int) -> Batch:
        """The global batch of a step (0 is the first)."""
        ...

    def shares(self, plan: BatchPlan, replica: int, replicas: int) -> Iterator[Batch]:
        """What the strategy's replica trains on, step by step."""
        ...


@dataclass(frozen=True)
class GivenBatches:
    """Global batches that exist already. Each replica gets its contiguous rows, padded as the loader pads."""

    batches: Sequence[Batch]

    def __post_init__(self) -> None:
        sizes = {batch.size for batch in self.batches}
        if len(sizes) != 1:
            raise UsageError(
                f"global batches of {sorted(sizes)} rows",
                "all steps have a global batch of one size, and there is one at least",
                "data=[Batch(...), ...] of the same number of rows",
            )

    @property
    def steps(self) -> int:
        return len(self.batches)

    @property
    def size(self) -> int:
        return self.batches[0].size

    def whole(self, step: int) -> Batch:
        return self.batches[step]

    def shares(self, plan: BatchPlan, replica: int, replicas: int) -> Iterator[Batch]:
        for batch in self.batches:
            yield rows_of(batch, *plan.row_range(replica, replicas), plan.rows)


def rows_of(batch: Batch, start: int, stop: int, rows: int) -> Batch:
    """Rows [start, stop) of a global batch, with masked padding up to `rows`."""

    def cut(tensor: Tensor, fill: int) -> Tensor:
        part = tensor[start:stop]
        padding = part.new_full((rows - len(part), *part.shape[1:]), fill)
        return torch.cat([part, padding])

    return Batch(
        input_ids=cut(batch.input_ids, 0),
        labels=cut(batch.labels, IGNORE_INDEX),
        document_ids=None if batch.document_ids is None else cut(batch.document_ids, -1),
        sample_ids=cut(batch.sample_ids, -1),
        position=batch.position,
        position_ids=None if batch.position_ids is None else cut(batch.position_ids, 0),
    )


def synthetic(
    vocab_size: int, size: int, length: int, steps: int, seed: int = 0, document_mask: bool = False
) -> GivenBatches:
    """`steps` global batches of random tokens: 40% of the labels and the whole first row are ignored.

    document_mask: sequences are packed from documents of about four tokens, which attention does not cross.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        tokens, labels = _random_rows(vocab_size, size, length, generator)
        labels[torch.rand(size, length, generator=generator) < MASKED_SHARE] = IGNORE_INDEX
        if size > 1:
            labels[0] = IGNORE_INDEX
        ids = torch.arange(step * size, (step + 1) * size)
        documents = positions = None
        if document_mask:
            documents = (torch.rand(size, length, generator=generator) < 1 / 4).cumsum(dim=1)
            positions = document_positions(documents)
        batches.append(Batch(tokens, labels, documents, ids, step * size, positions))
    return GivenBatches(batches)


def _random_rows(
    vocab_size: int, size: int, length: int, generator: torch.Generator
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    low = 3 if vocab_size > 8 else 0  # below lie padding and the like, which some models treat in their own way
    tokens, labels = (torch.randint(low, vocab_size, (size, length), generator=generator) for _ in range(2))
    return tokens, labels


class DatasetBatches:
    """The config's token data set: ranks read it through the loader of `trainwright train`, the reference alone."""

    def __init__(self, config: Config, size: int, steps: int) -> None:
        self._steps, self._size = steps, size
        self._config = config
        self._split = open_dataset(config.data).split("train")
        self._whole: list[Batch] = []
        self._loader = self._open(BatchPlan(size, size, 1), 0, 1)

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def size(self) -> int:
        return self._size

    def _open(self, plan: BatchPlan, replica: int, replicas: int) -> TokenLoader:
        config = self._config
        return TokenLoader(
            self._split,
            config.data.sequence_length,
            plan,
            seed=config.seed,
            shuffle=config.data.shuffle,
            replica=replica,
            replicas=replicas,
            prefetch=0,
            document_mask=config.data.document_mask,
        )

    def whole(self, step: int) -> Batch:
        while len(self._whole) <= step:
            self._whole.append(next(self._loader))
        return self._whole[step]

    def shares(self, plan: BatchPlan, replica: int, replicas: int) -> Iterator[Batch]:
        loader = self._open(plan, replica, replicas)
        for _ in range(self.steps):
            yield next(loader)


def plan_for(config: Config, replicas: int) -> BatchPlan:
    """How a global batch is cut for `replicas`: as the config says; two rows a micro-batch where it gives no size."""
    batch = config.batch
    if batch.global_size is None and batch.global_tokens is None and batch.micro_size is None:
        batch = batch.model_copy(update={"micro_size": 2})
    return plan_batches(batch, config.data.sequence_length, replicas)
