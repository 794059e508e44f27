"""The loader: this replica's share of each global batch, prefetched in the background, resumable to the sample.

Global batch s holds the samples at positions [s·G, (s+1)·G) of the endless order (`order.py`), whatever the number of
replicas R; replica r holds a contiguous run of them. Where groups of ranks train by themselves (`outer`), each has an
equal, contiguous share of every global batch, and a cursor of its own. Sample i of a split is tokens [i·T, i·T + T] (T + 1 of them):
inputs and, shifted by one, labels. Legend: B rows on this replica, T tokens a sequence, G sequences a global batch.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from trainwright.data.batch import IGNORE_INDEX, Batch, BatchPlan
from trainwright.data.shards import TokenSplit
from trainwright.errors import DataError, DataVersionError

__all__ = ["TokenLoader", "eval_batches"]

_PUT_TIMEOUT_S = 0.1


def _read_rows(
    split: TokenSplit, sequence_length: int, samples: Any, rows: int, position: int, document_mask: bool
) -> Batch:
    """A batch of `rows` rows: the sequences `samples` (int64 indices), then masked padding rows."""
    length = sequence_length
    inputs = np.zeros((rows, length), dtype=np.int64)
    labels = np.full((rows, length), IGNORE_INDEX, dtype=np.int64)
    documents = np.full((rows, length), -1, dtype=np.int64)
    sample_ids = np.full(rows, -1, dtype=np.int64)
    sample_ids[: len(samples)] = samples
    for row, sample in enumerate(samples):
        start = split.sequence_start(int(sample), length)
        # A split's last sequence may be short (evaluation only): the rest of its row is padding.
        count = min(length + 1, split.num_tokens - start)
        tokens, mask, numbers = split.read(start, count)
        inputs[row, : count - 1] = tokens[:-1]
        labels[row, : count - 1] = tokens[1:] if mask is None else np.where(mask[1:] != 0, tokens[1:], IGNORE_INDEX)
        documents[row, : count - 1] = numbers[:-1]
    return Batch(
        input_ids=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(documents),
        sample_ids=torch.from_numpy(sample_ids),
        position=position,
        position_ids=document_positions(torch.from_numpy(documents)) if document_mask else None,
    )


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] numbers of documents -> [B, T] each token's place in its document, counted from the sequence's start where
    the document began before."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return place - torch.where(starts, place, 0).cummax(dim=1).values


class _Prefetcher:
    """A thread that builds batches ahead. It knows nothing of the loader, so a forgotten loader can be collected."""

    def __init__(self, build: Callable[[int], Batch], position: int, stride: int, depth: int) -> None:
        self._build, self._position, self._stride = build, position, stride
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainwright-data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = self._build(self._position)
            except BaseException as error:
                item = error
            self._position += self._stride
            while not self._stop.is_set():
                with contextlib.suppress(queue.Full):
                    self._queue.put(item, timeout=_PUT_TIMEOUT_S)
                    break
            if isinstance(item, BaseException):
                return

    def get(self) -> Batch:
        """The next batch; raises what the thread raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


class TokenLoader:
    """An endless iterator of `Batch`, one for each optimizer step, padded to `plan.rows` rows on every replica."""

    def __init__(
        self,
        split: TokenSplit,
        sequence_length: int,
        plan: BatchPlan,
        *,
        seed: int = 0,
        shuffle: bool = True,
        replica: int = 0,
        replicas: int = 1,
        prefetch: int = 2,
        document_mask: bool = False,
    ) -> None:
        """`replica` of `replicas` data-parallel replicas; `prefetch` batches are built ahead (0: none, in the loop).
        `document_mask`: batches say that attention stays inside documents.

        Raises DataError if the split is shorter than one sequence, ConfigError if the plan has no room for the batch.
        """
        count = split.num_sequences(sequence_length) if sequence_length > 0 else 0
        if count == 0:
            raise DataError(
                f"the split {split.name} of {split.num_tokens:,} tokens and sequence_length {sequence_length:,}",
                "a split holds at least one sequence and the token behind it",
                f"data.sequence_length={max(1, min(256, split.num_tokens - 1))}"
                if split.num_tokens > 1
                else "more text",
            )
        self.split, self.sequence_length, self.plan = split, sequence_length, plan
        self.seed, self.shuffle, self.replica, self.replicas = seed, shuffle, replica, replicas
        self.num_sequences = count
        """Sequences of an epoch."""
        self._order = split.order(sequence_length, seed, shuffle)
        first_row, last_row = plan.row_range(replica, replicas)
        for other in (0, replicas - 1):
            plan.row_range(other, replicas)  # a plan without room must fail on every replica, not only on the fullest
        self._first_row, self._rows = plan.first_of_group + first_row, last_row - first_row
        self._prefetch, self._document_mask = prefetch, document_mask
        self._position = 0
        self._closed = False
        self._prefetcher: _Prefetcher | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def position(self) -> int:
        """Global samples handed out so far, over all replicas (and those of other groups' shares of the same global
        batches): the position of the next global batch's first one."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the split so far."""
        return self._position / self.num_sequences

    def samples_at(self, position: int, count: int) -> Any:
        """The samples at `count` positions from `position` on, over all replicas; int64 [count]."""
        return self._order.samples(position, count)

    def set_position(self, position: int) -> None:
        """Goes to a global sample position, at no cost."""
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            raise DataError(f"data position {position!r}", "a position is a whole number from 0 up", "0")
        self._stop()
        self._position = position

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON: it counts batches that were handed out, not those prefetched."""
        return {
            "position": self._position,
            "seed": self.seed,
            "version": self.split.version,
            "split": self.split.name,
            "shuffle": self.shuffle,
            "sequence_length": self.sequence_length,
        }

    def load_state_dict(self, state: dict[str, Any], allow_change: bool = False) -> None:
        """Goes on where `state` was taken, on any number of replicas.

        Raises DataVersionError if it is of another data set, DataError if of another order (seed, shuffle, split,
        sequence length); `allow_change` goes on at the same position of this loader's own order instead.
        """
        mine = self.state_dict()
        missing = [key for key in mine if key not in state] if isinstance(state, dict) else list(mine)
        if missing:
            raise DataError(
                f"a data cursor without {', '.join(missing)}", "a cursor is what state_dict() gave", "resume without it"
            )
        if not allow_change and state["version"] != mine["version"]:
            raise DataVersionError(
                f"the cursor is of data set {str(state['version'])[:12]}, this one is {self.split.version[:12]}",
                "a run goes on with the data that it was trained on",
                "data.allow_change=true goes on with this data set at the same position",
            )
        differing = [key for key in mine if key not in ("position", "version") and state[key] != mine[key]]
        if differing and not allow_change:
            raise DataError(
                "the cursor is of another order: "
                + ", ".join(f"{key} {state[key]!r} there, {mine[key]!r} here" for key in differing),
                "the order is a function of the data set, seed, shuffle and sequence length",
                f"{differing[0]}={state[differing[0]]}, or data.allow_change=true",
            )
        self.set_position(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        if self._prefetch == 0:
            batch = self._builder()(self._position)
        else:
            if self._prefetcher is None:
                self._start()
            assert self._prefetcher is not None
            try:
                batch = self._prefetcher.get()
            except BaseException:
                self._stop()  # the next call tries the same batch again
                raise
        self._position += self.plan.stride
        return batch

    def _builder(self) -> Callable[[int], Batch]:
        split, length, order = self.split, self.sequence_length, self._order
        first_row, count, rows, mask = self._first_row, self._rows, self.plan.rows, self._document_mask

        def build(position: int) -> Batch:
            return _read_rows(split, length, order.samples(position + first_row, count), rows, position, mask)

        return build

    def _start(self) -> None:
        self._prefetcher = _Prefetcher(self._builder(), self._position, self.plan.stride, self._prefetch)
        # Also runs at the interpreter's end: a thread must not be inside torch when that is torn down.
        self._finalizer = weakref.finalize(self, self._prefetcher.stop)

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._prefetcher = self._finalizer = None

    def close(self) -> None:
        """Ends the prefetching; the loader gives no more batches. Twice is fine."""
        self._stop()
        self._closed = True

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eval_batches(
    split: TokenSplit,
    sequence_length: int,
    plan: BatchPlan,
    *,
    replica: int = 0,
    replicas: int = 1,
    max_batches: int = 0,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """One pass over a split in its own order: every token but the first is predicted once, whatever the replicas.

    Global batches of `plan.global_size` sequences, at most `max_batches` of them (0: all); this replica's rows,
    padded to `plan.rows`; every replica gets the same number of batches. The last sequence may be short, its row is
    padded with masked positions. Raises DataError for a split without two tokens.
    """
    if split.num_tokens < 2 or sequence_length < 1:
        raise DataError(
            f"the split {split.name} of {split.num_tokens} tokens",
            "an evaluation needs a token to predict",
            "prepare the data with --held-out 0.05 and more than one document",
        )
    total = -(-(split.num_tokens - 1) // sequence_length)
    first_row, last_row = plan.row_range(replica, replicas)
    plan.row_range(0, replicas)
    starts = range(0, total, plan.global_size)
    for start in starts[:max_batches] if max_batches else starts:
        samples = np.arange(min(start + first_row, total), min(start + last_row, total), dtype=np.int64)
        yield _read_rows(split, sequence_length, samples, plan.rows, start, document_mask)
