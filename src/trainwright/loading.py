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
        ranks_without = _without(batch is _END)
        if len(ranks_without) == (dist.get_world_size() if dist.is_initialized() else 1):
            return
        if ranks_without:
            told = (
                f"{of_ranks(ranks_without)} {'have' if len(ranks_without) > 1 else 'has'} no batch at step {count + 1}"
            )
            if uneven == "error":
                raise DataError(told, "uneven=error: every rank has as many batches", 'uneven="stop" or uneven="pad"')
            if uneven == "stop":
                if batch is not _END:
                    warnings.warn(
                        f"{told}: all end there, batches that are left on the others are not used", stacklevel=2
                    )
                return
        if batch is _END:
            batch = _masked(last, count)
        last, count = batch, count + 1
        yield batch


_END: Any = object()


def _without(mine: bool) -> list[int]:
    """The ranks that have no batch. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [0] if mine else []
    device = "cuda" if "nccl" in dist.get_backend() and "gloo" not in dist.get_backend() else "cpu"
    flags = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=device)
    flags[dist.get_rank()] = int(mine)
    here.collective(b"agreement on a next batch")
    dist.all_reduce(flags)
    return [int(rank) for rank in flags.nonzero().flatten()]


def _masked(last: Any, count: int) -> Any:
    """`last` with every label masked."""
    if isinstance(last, Batch):
        return replace(
            last, labels=torch.full_like(last.labels, IGNORE_INDEX), sample_ids=torch.full_like(last.sample_ids, -1)
        )
    if isinstance(last, dict) and isinstance(last.get("labels"), torch.Tensor):
        return last | {"labels": torch.full_like(last["labels"], IGNORE_INDEX)}
    what = "it has had none" if not count else f"it is a {type(last).__name__} without labels"
    raise DataError(
        f"uneven=pad: a rank without a batch needs one to mask, and {what}",
        "a batch is a Batch, or a dict with a tensor `labels`",
        'uneven="stop"',
    )
