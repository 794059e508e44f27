"""Reading a checkpoint: the ranks agree that it is whole before any of them touches a tensor.

The way of a load: rank 0 reads the manifest and all get it -> the files are verified, each by one rank -> the names,
shapes and dtypes asked for are compared with the manifest -> every rank copies the slices that its shards need
(torch.distributed.checkpoint's planner finds them), whatever the world size and the mesh of the save were.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from trainwright import storage
from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.folder import locate, size_problem
from trainwright.checkpoint.manifest import DTYPES, MANIFEST_NAME, Manifest, read_manifest_file
from trainwright.checkpoint.shard_file import dtype_name, header_problem
from trainwright.errors import CheckpointError

__all__ = ["load", "load_weights", "read_manifest", "verify"]

PathLike = str | os.PathLike[str]
_NAMED = 4  # how many names or files an error lists
_REMEDY = "resume from another whole checkpoint"


def read_manifest(path: PathLike, group: dist.ProcessGroup | None = None) -> Manifest:
    """The manifest of the checkpoint at `path`, on all ranks. Collective. Raises CheckpointError."""
    return Ranks(group).on_first(lambda: _open(Path(path)))[1]


def verify(path: PathLike, group: dist.ProcessGroup | None = None) -> Manifest:
    """Proves that every file of the checkpoint is what the manifest says: size, SHA-256, what its header lists.

    Collective: the files are shared out over the ranks, and all ranks come to one verdict.
    Raises CheckpointError naming the first few files and what is wrong with them.
    """
    return _verify(Path(path), Ranks(group))[1]


def load(
    path: PathLike,
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Fills `tensors` (DTensors on any mesh, or plain tensors) in place; the checkpoint's scalars. Collective.

    strict: the names must be the checkpoint's (an alias of a tied tensor stands for it; under pipeline parallelism
        the ranks' names are taken together). Otherwise those in both are filled.
    verified: `verify` has passed on this path a moment ago, the files are not hashed again.
    Raises CheckpointError, the same on all ranks and before any tensor has changed (unless the disk fails midway,
    which the error says).
    """
    ranks = Ranks(group)
    place, manifest = _opened(Path(path), ranks) if verified else _verify(Path(path), ranks)
    _fill(place, manifest, tensors, ranks, strict, lambda name: True)
    return dict(manifest.scalars)


def load_weights(
    path: PathLike,
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Like `load`, for the 'model.' tensors alone: optimizer, EMA and scalars stay out. The manifest."""
    ranks = Ranks(group)
    place, manifest = _verify(Path(path), ranks)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    _fill(place, manifest, weights, ranks, strict, lambda name: name.startswith("model."))
    return manifest


def _opened(path: Path, ranks: Ranks) -> tuple[Path, Manifest]:
    """The same on all ranks. Rank 0's name for it, in each rank's own folder: machines may have other roots."""
    place, manifest = ranks.on_first(lambda: _open(path))
    return path.with_name(place.name), manifest


def _open(path: Path) -> tuple[Path, Manifest]:
    """Where the checkpoint lies, and its manifest."""
    place = locate(path)
    try:
        return place, read_manifest_file(place)
    except FileNotFoundError:
        got = f"{path} does not exist"
        if path.is_dir():
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            got = f"{path} has no {MANIFEST_NAME}; found in it: {found}"
        elif path.exists():
            got = f"{path} is a file"
        raise CheckpointError(got, "a checkpoint is a folder with a manifest", _nearby(path)) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}", "", _nearby(path)) from None


def _nearby(path: Path) -> str:
    """The checkpoints in and beside `path`, as a remedy."""
    for folder in (path, path / "checkpoints", path.absolute().parent):
        if not folder.is_dir():
            continue
        names = sorted(entry.name for entry in folder.iterdir() if (entry / MANIFEST_NAME).is_file())
        names = [name for name in names if not name.startswith(".")]
        if names:
            return f"checkpoints in {folder}: {', '.join(names[-8:])}"
    return f"there is no checkpoint in {path.absolute().parent}"


def _verify(path: Path, ranks: Ranks) -> tuple[Path, Manifest]:
    path, manifest = _opened(path, ranks)
    share = _share(manifest, ranks)
    found = ranks.everywhere(lambda: [problem for name in share if (problem := _file_problem(path, name, manifest))])
    problems = sorted(problem for part in found for problem in part)
    if problems:
        more = f"; and {len(problems) - _NAMED} more files" if len(problems) > _NAMED else ""
        got = f"checkpoint {path} is damaged: {'; '.join(problems[:_NAMED])}{more}"
        raise CheckpointError(got, "every file is as long as, and hashes to, what the manifest says", _REMEDY)
    return path, manifest


def _share(manifest: Manifest, ranks: Ranks) -> list[str]:
    """The files this rank verifies: the largest first, each to the rank with the least to read."""
    to_read = [(0, rank) for rank in range(ranks.size)]
    share = []
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        planned_bytes, rank = to_read[0]
        heapq.heapreplace(to_read, (planned_bytes + entry.size_bytes, rank))
        if rank == ranks.rank:
            share.append(name)
    return share


def _file_problem(path: Path, name: str, manifest: Manifest) -> str | None:
    entry = manifest.files[name]
    problem = size_problem(path, name, entry)
    if problem is not None:
        return problem
    try:
        if storage.sha256_file(path / name) != entry.sha256:
            return f"{name} does not match its SHA-256"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    expected = {
        chunk.key(tensor): (stored.dtype, chunk.shape)
        for tensor, stored in manifest.tensors.items()
        for chunk in stored.chunks
        if chunk.file == name
    }
    problem = header_problem(path / name, expected)
    return f"{name}: {problem}" if problem else None


def _fill(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    ranks: Ranks,
    strict: bool,
    wanted: Callable[[str], bool],
) -> None:
    """Compares what is asked for with what is there, then copies. `wanted`: which stored tensors count at all."""
    stored = {name: name for name in manifest.tensors} | manifest.aliases
    present = {name: tensor for name, tensor in tensors.items() if name in stored}

    def local() -> list[str]:
        _check_shapes(path, manifest, stored, present)
        return sorted(tensors)

    def combine(requested: list[list[str]]) -> list[None]:
        _compare_names(path, {name for part in requested for name in part}, stored, strict, wanted)
        return [None] * ranks.size

    ranks.planned(local, combine)
    try:
        ranks.everywhere(lambda: _read(path, manifest, stored, present))
    except CheckpointError as error:
        rule = "the files were whole a moment ago; some tensors are loaded and some are not"
        raise CheckpointError(f"reading {path}: {error.got}", rule, "do not train on; load again") from None


def _compare_names(
    path: Path, names: set[str], stored: Mapping[str, str], strict: bool, wanted: Callable[[str], bool]
) -> None:
    """`stored`: name or alias -> name in the checkpoint."""
    if not strict:
        if not names & stored.keys():
            got = f"{path} holds none of the {len(names)} tensors asked for: {', '.join(sorted(names)[:_NAMED])}, ..."
            raise CheckpointError(got, "at least one name must be in both")
        return
    covered = {stored[name] for name in names if name in stored}
    missing = sorted(names - stored.keys())
    unexpected = sorted(filter(wanted, set(stored.values()) - covered))
    parts = []
    for found, what in ((missing, "not in the checkpoint"), (unexpected, "only in the checkpoint")):
        if found:
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            parts.append(f"{what}: {', '.join(found[:_NAMED])}{more}")
    if parts:
        rule = "model, optimizer and EMA are those of the run that saved"
        raise CheckpointError(f"{path}: {'; '.join(parts)}", rule, "use the same model and optimizer, or init_from")


def _check_shapes(
    path: Path, manifest: Manifest, stored: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    wrong = []
    for name, tensor in tensors.items():
        entry = manifest.tensors[stored[name]]
        if tuple(tensor.shape) != entry.shape:
            wrong.append(f"{name} is {list(entry.shape)} in the checkpoint, {list(tensor.shape)} here")
        elif not _castable(DTYPES[entry.dtype][0], tensor.dtype):
            wrong.append(f"{name} is {entry.dtype} in the checkpoint, {dtype_name(tensor.dtype) or tensor.dtype} here")
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        got = f"{path}: {'; '.join(sorted(wrong)[:_NAMED])}{more}"
        raise CheckpointError(got, "shapes are equal, dtypes are equal or both floating point", "use the same model")


def _castable(source: torch.dtype, target: torch.dtype) -> bool:
    return source == target or (source.is_floating_point and target.is_floating_point)


def _read(path: Path, manifest: Manifest, stored: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies the slices this rank's shards overlap, file by file (memory-mapped: never a whole file)."""
    from safetensors import safe_open

    targets = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), _metadata(manifest, stored, targets), False)
    plan = planner.finish_plan(planner.create_local_plan())
    home = {
        (name, chunk.offset): (chunk.file, chunk.key(stored[name]))
        for name in targets
        for chunk in manifest.tensors[stored[name]].chunks
    }
    by_file: dict[str, list[tuple[str, ReadItem]]] = {}
    for item in plan.items:
        file, key = home[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        by_file.setdefault(file, []).append((key, item))
    with torch.no_grad():
        for file, items in sorted(by_file.items()):
            with safe_open(path / file, framework="pt") as stream:
                for key, item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_slice(stream, key, item))


def _slice(stream: Any, key: str, item: ReadItem) -> torch.Tensor:
    if not item.lengths:
        return stream.get_tensor(key)
    box = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
    return stream.get_slice(key)[box]


def _metadata(manifest: Manifest, stored: Mapping[str, str], targets: Mapping[str, torch.Tensor]) -> Metadata:
    """The manifest's table of the targets in the planner's own words."""
    table: dict[str, Any] = {}
    for name in targets:
        entry = manifest.tensors[stored[name]]
        table[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=DTYPES[entry.dtype][0]),
            size=torch.Size(entry.shape),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(chunk.offset), sizes=torch.Size(chunk.shape))
                for chunk in entry.chunks
            ],
        )
    return Metadata(state_dict_metadata=table)
