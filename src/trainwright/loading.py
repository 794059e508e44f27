"""For those who write the loop themselves: `tw.data_loader`, and `tw.even` for loaders that end unevenly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from trainwright import distributed
from trainwright.config import Config, Resolved, load_config
from trainwright.data.batch import IGNORE_INDEX, Batch
from trainwright.data.loader import TokenLoader
from trainwright.data.mix import open_dataset
from trainwright.data.plan import plan_batches
from trainwright.errors import ConfigError, DataError
from trainwright.ledger import here
from trainwright.mesh import resolve_degrees
from trainwright.position import of_ranks

T = TypeVar("T")


def data_loader(config: str | Path | Mapping[str, Any] | Config | Resolved) -> TokenLoader:
    """This replica's batches of the config's data set, one for each optimizer step (`engine.train_batch(batch)`).

    Its `state_dict()` belongs into `engine.save(path, state=...)`. Collective: starts the process group if none runs.
    """
    resolved = load_config(config).config
    if resolved.data.path is None and not resolved.data.mix:
        raise ConfigError("data.path is not set", "a loader reads a token data set", "data.path=FOLDER")
    distributed.start(resolved.parallel.backend)
    degrees = resolve_degrees(resolved.parallel, resolved.zero.stage, dist.get_world_size())
    replicas = degrees.replicate * degrees.shard
    # Model-parallel axes are innermost (context, tensor) or outermost (pipeline): neighbours share a replica.
    replica = dist.get_rank() // (degrees.context * degrees.tensor) % replicas
    return TokenLoader(
        open_dataset(resolved.data).split("train"),
        resolved.data.sequence_length,
        plan_batches(resolved.batch, resolved.data.sequence_length, replicas),
        seed=resolved.seed,
        shuffle=resolved.data.shuffle,
        replica=replica,
        replicas=replicas,
        prefetch=2 * resolved.data.workers,
        document_mask=resolved.data.document_mask,
    )


def even(batches: Iterable[T], uneven: Literal["stop", "pad", "error"] = "stop") -> Iterator[T]:
    """`batches` of this rank, as many as on all the others: steps are collective, a rank that has run out would be waited
    for. Collective: all ranks iterate, and agree before each batch on whether everybody has one.

    uneven: "stop" ends with the rank that has the fewest; "pad" goes on to the most, ranks that have run out get their
    last batch again with every label masked (it must be a `Batch` or a dict with `labels`), which changes no gradient;
    "error" raises DataError, on all ranks, naming those that have run out.
    """
    if uneven not in ("stop", "pad", "error"):
        raise ConfigError(f"uneven={uneven!r}", "stop, pad or error", 'uneven="stop"')
    iterator = iter(batches)
    last: Any = None
    count = 0
    while True:
        batch = next(iterator, _END)
        states = _states(_HAS if batch is not _END else _CAN_MASK if _maskable(last) else _CANNOT)
        without = [rank for rank, state in enumerate(states) if state != _HAS]
        if len(without) == len(states):
            return
        if without:
            told = f"{of_ranks(without)} {'have' if len(without) > 1 else 'has'} no batch at step {count + 1}"
            if uneven == "error":
                raise DataError(told, "uneven=error: every rank has as many batches", 'uneven="stop" or uneven="pad"')
            cannot = [rank for rank, state in enumerate(states) if state == _CANNOT]
            if uneven == "pad" and cannot:
                raise DataError(
                    f"{told}, and {of_ranks(cannot)} {'have' if len(cannot) > 1 else 'has'} had none to mask",
                    "uneven=pad: a rank without a batch gets its last one again, a Batch or a dict with a tensor `labels`",
                    'uneven="stop"',
                )
            if uneven == "stop":
                if batch is not _END:
                    warnings.warn(
                        f"{told}: all end there, batches that are left on the others are not used", stacklevel=2
                    )
                return
        if batch is _END:
            batch = _masked(last)
        last, count = batch, count + 1
        yield batch


_END: Any = object()
_HAS, _CAN_MASK, _CANNOT = 0, 1, 2


def _states(mine: int) -> list[int]:
    """What each rank has. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    device = "cuda" if "nccl" in dist.get_backend() and "gloo" not in dist.get_backend() else "cpu"
    states = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=device)
    states[dist.get_rank()] = mine
    here.collective(b"agreement on a next batch")
    dist.all_reduce(states)
    return [int(state) for state in states.tolist()]


def _maskable(batch: Any) -> bool:
    return isinstance(batch, Batch) or (isinstance(batch, dict) and isinstance(batch.get("labels"), torch.Tensor))


def _masked(last: Any) -> Any:
    """`last` with every label masked."""
    if isinstance(last, Batch):
        labels, samples = torch.full_like(last.labels, IGNORE_INDEX), torch.full_like(last.sample_ids, -1)
        return replace(last, labels=labels, sample_ids=samples)
    return last | {"labels": torch.full_like(last["labels"], IGNORE_INDEX)}
