"""Writing a checkpoint: collective, whole or not at all.

The way of a save: the ranks plan who writes what (torch.distributed.checkpoint's planner: shards where they are,
replicated tensors spread over the ranks) -> rank 0 makes a temporary folder beside the final one -> every rank writes
its safetensors file, hashed on the way and flushed to the disk -> rank 0 writes the manifest and renames the folder.
A kill at any point leaves the old state or a whole new checkpoint; a failure on one rank is the same error on all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from trainwright import storage
from trainwright.checkpoint import folder
from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.manifest import (
    MANIFEST_NAME,
    Chunk,
    FileEntry,
    TensorEntry,
    check_json,
    new_manifest,
    parse_manifest,
    render_manifest,
)
from trainwright.checkpoint.shard_file import dtype_name, write_shard_file
from trainwright.errors import CheckpointError

__all__ = [
    "CheckpointContent", "OnCommit", "PlannedSave", "Writer", "manifest_of", "plan_save", "save", "shard_name", "write_own",
    "write_planned",
]  # fmt: skip

OnCommit = Callable[[Path], None]


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint holds.

    tensors: name -> DTensor (this rank's shard of it) or plain tensor (the same on all ranks); names begin with
        'model.', 'optimizer.', 'ema.' or 'outer.'. Under pipeline parallelism each rank names only what it holds.
    scalars: JSON data, at least `step`; rank 0's are saved.
    aliases: tied tensors, other name -> the name in `tensors`.
    """

    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass
class PlannedSave:
    """This rank's part of a save: the chunks it writes. On rank 0 also the table of all tensors."""

    path: Path
    chunks: list[tuple[str, torch.Tensor]]
    tensors: dict[str, TensorEntry]
    scalars: dict[str, Any]
    aliases: dict[str, str]
    total_bytes: int

    def stage(self) -> None:
        """Copies the chunks to host memory: once each, only those this rank writes. Training may go on then."""
        self.chunks = [(key, tensor.detach().to("cpu", copy=True)) for key, tensor in self.chunks]


Writer = Callable[[PlannedSave, Ranks, OnCommit | None], None]
"""Writes what was planned and commits it. Collective. `write_planned`, or one that goes to an object store too."""


@dataclass(frozen=True)
class _LocalPlan:
    """What a rank tells rank 0 before the save."""

    plan: SavePlan
    step: int
    empty: dict[str, TensorEntry]  # tensors of no elements: nothing to write, still to be listed
    aliases: dict[str, str]


@dataclass(frozen=True)
class _Assignment:
    """What rank 0 answers."""

    plan: SavePlan
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]
    total_bytes: int


def save(
    path: str | os.PathLike[str],
    content: CheckpointContent,
    group: dist.ProcessGroup | None = None,
    on_commit: OnCommit | None = None,
    writer: Writer | None = None,
) -> Path:
    """Writes the checkpoint `path`, replacing one that is there. Collective over `group` (None: all ranks).

    `on_commit` is called with the path on rank 0 once the checkpoint is in place (retention). `writer`: one that goes to
    an object store too, instead of `write_planned`.
    Raises CheckpointError, the same on all ranks: a full disk, a tensor the format has no dtype for, content that
    is not JSON, ranks at different steps, a folder the ranks do not share.
    """
    ranks = Ranks(group)
    (writer or write_planned)(plan_save(path, content, ranks), ranks, on_commit)
    return Path(path)


def plan_save(path: str | os.PathLike[str], content: CheckpointContent, ranks: Ranks) -> PlannedSave:
    """Decides which rank writes which chunk. Collective; nothing is written yet."""
    if storage.is_url(path):
        rule = "a checkpoint is saved to a folder; runs of `trainwright train` copy theirs to an object store"
        raise CheckpointError(f"a save to {path}", rule, "a folder here, or checkpoint.store in the run's config")
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    assignment = ranks.planned(
        lambda: _local_plan(planner, content, ranks),
        lambda plans: _assign(planner, plans),
    )
    plan = planner.finish_plan(assignment.plan)
    # Sorted so that a file depends on what is in it only, not on the order of some dict.
    items = sorted(plan.items, key=lambda item: (item.index.fqn, item.index.offset or ()))
    chunks = [(_chunk(item, "").key(item.index.fqn), _data(planner, item)) for item in items]
    scalars = check_json(content.scalars) if ranks.is_first else {}
    return PlannedSave(
        Path(os.path.abspath(path)), chunks, assignment.tensors, scalars, assignment.aliases, assignment.total_bytes
    )


def _local_plan(planner: DefaultSavePlanner, content: CheckpointContent, ranks: Ranks) -> _LocalPlan:
    tensors = dict(content.tensors)
    empty = {}
    for name, tensor in tensors.items():
        dtype = dtype_name(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided or tensor.is_meta:
            got = f"tensor {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise CheckpointError(got, "a checkpoint holds dense tensors of safetensors' dtypes", "convert it first")
        if tensor.numel() == 0:
            empty[name] = TensorEntry(dtype=dtype, shape=tuple(tensor.shape), chunks=())
    scalars = check_json(content.scalars)
    step = scalars.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"scalars['step'] is {step!r}", "a checkpoint knows its step, a count from 0")
    planner.set_up_planner(tensors, None, ranks.is_first)
    plan = planner.create_local_plan()
    # Empty shards (fewer rows than ranks) have nothing to write.
    items = [item for item in plan.items if item.tensor_data is None or item.tensor_data.chunk.sizes.numel()]
    return _LocalPlan(SavePlan(items), step, empty, dict(content.aliases))


def _assign(planner: DefaultSavePlanner, plans: list[_LocalPlan]) -> list[_Assignment]:
    steps = {plan.step for plan in plans}
    if len(steps) > 1:
        got = f"the ranks are at different steps: {', '.join(map(str, (plan.step for plan in plans[:8])))}"
        raise CheckpointError(got, "save() is called at the same step on all ranks")
    try:
        assigned, _ = planner.create_global_plan([plan.plan for plan in plans])
    except (ValueError, AssertionError) as error:
        raise CheckpointError(f"the ranks' shards do not make whole tensors: {error}") from None
    entries: dict[str, TensorEntry] = {}
    chunks: dict[str, list[Chunk]] = {}
    for rank, plan in enumerate(assigned):
        for item in plan.items:
            data = item.tensor_data
            assert data is not None, f"{item.index} is not a tensor"
            dtype = dtype_name(data.properties.dtype) or str(data.properties.dtype)
            entries[item.index.fqn] = TensorEntry(dtype=dtype, shape=tuple(data.size), chunks=())
            chunks.setdefault(item.index.fqn, []).append(_chunk(item, shard_name(rank)))
    for local in plans:
        entries.update(local.empty)
    tensors = {
        name: entry.model_copy(update={"chunks": tuple(sorted(chunks.get(name, ()), key=lambda chunk: chunk.offset))})
        for name, entry in sorted(entries.items())
    }
    total_bytes = sum(entry.size_bytes for entry in tensors.values())
    aliases = {alias: name for local in plans for alias, name in local.aliases.items()}
    for alias, name in aliases.items():
        if name not in tensors or alias in tensors:
            got = f"alias {alias} of {name}"
            raise CheckpointError(got, "an alias is another name of a tensor that is saved", "drop the alias")
    first = _Assignment(assigned[0], tensors, aliases, total_bytes)
    return [first, *(_Assignment(plan, {}, {}, 0) for plan in assigned[1:])]


def shard_name(rank: int) -> str:
    """File of a rank of the group."""
    return f"rank-{rank:05d}.safetensors"


def _chunk(item: WriteItem, file: str) -> Chunk:
    assert item.tensor_data is not None, f"{item.index} is not a tensor"
    box = item.tensor_data.chunk
    return Chunk(file=file, offset=tuple(box.offsets), shape=tuple(box.sizes))


def _data(planner: DefaultSavePlanner, item: WriteItem) -> torch.Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor), f"{item.index} is not a tensor"
    return data.detach()


def write_planned(planned: PlannedSave, ranks: Ranks, on_commit: OnCommit | None = None) -> None:
    """Writes what was planned and commits it. Collective; may run in a thread with a group of its own."""
    path = planned.path
    temporary = folder.temporary_path(path, "writing", ranks.on_first(lambda: _open_temporary(planned)))
    try:
        folder.reached("folder made")
        ranks.planned(
            lambda: write_own(temporary, planned, ranks.rank),
            lambda parts: _commit(planned, temporary, parts),
        )
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        folder.in_progress.discard(temporary)
    if on_commit is not None:
        ranks.on_first(lambda: on_commit(path))


def _open_temporary(planned: PlannedSave) -> str:
    parent = planned.path.parent
    parent.mkdir(parents=True, exist_ok=True)
    folder.refuse_foreign(planned.path)
    free = storage.free_bytes(parent)
    if free < planned.total_bytes:
        got = f"{parent} has {free / 1e9:.2f} GB free, the checkpoint takes {planned.total_bytes / 1e9:.2f} GB"
        raise CheckpointError(
            got, "a new checkpoint is whole before an old one goes", "free space, or set checkpoint.keep=1"
        )
    token = secrets.token_hex(4)
    temporary = folder.temporary_path(planned.path, "writing", token)
    folder.in_progress.add(temporary)
    temporary.mkdir()
    return token


def write_own(temporary: Path, planned: PlannedSave, rank: int) -> dict[str, FileEntry]:
    """Writes this rank's file into a folder that is there; the file's entry, or nothing where it has no chunk."""
    if not planned.chunks:
        return {}
    name = shard_name(rank)
    try:
        entry = write_shard_file(temporary / name, planned.chunks)
    except OSError as error:
        got = f"cannot write {planned.path.name}/{name}: {error}"
        raise CheckpointError(got, "the folder is shared by all ranks and has space", "") from error
    storage.fsync_dir(temporary)
    return {name: entry}


def _commit(planned: PlannedSave, temporary: Path, parts: list[dict[str, FileEntry]]) -> list[None]:
    folder.reached("shards written")
    files = {name: entry for part in parts for name, entry in part.items()}
    for name, entry in files.items():
        problem = folder.size_problem(temporary, name, entry)
        if problem is not None:
            got = f"rank 0 sees in {temporary}: {problem}"
            raise CheckpointError(got, "all ranks save into one folder that they share", "use a shared file system")
    storage.atomic_write_bytes(temporary / MANIFEST_NAME, manifest_of(planned, files, len(parts)))
    folder.reached("manifest written")
    folder.replace_folder(temporary, planned.path)
    return [None] * len(parts)


def manifest_of(planned: PlannedSave, files: Mapping[str, FileEntry], world_size: int) -> bytes:
    """The manifest's bytes, on rank 0, when all files are written."""
    data = render_manifest(new_manifest(planned.scalars, planned.tensors, files, planned.aliases, world_size))
    if render_manifest(parse_manifest(data)) != data:
        raise CheckpointError("the manifest does not read back as it was written", "scalars are plain JSON")
    return data
