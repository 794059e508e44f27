"""Where a run goes on: its newest whole checkpoint, in its folder or on its object store. Collective."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.fetch import fetch
from trainwright.checkpoint.load import verify
from trainwright.checkpoint.manifest import Manifest
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import CheckpointError
from trainwright.guard.shared_folder import Sites

__all__ = ["Remote", "ResumePoint", "resolve"]


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes: a checkpoint whose files have all been hashed, and those passed over with the reason."""

    path: Path
    manifest: Manifest
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class Remote:
    """The object store of a run, and which ranks share the folder beside it."""

    store: CheckpointStore
    sites: Sites


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that is whole at first sight. age: (time of the save, step); a folder's goes before the store's."""

    age: tuple[float, int]
    in_folder: bool
    name: str


def resolve(
    folder: CheckpointFolder,
    resume: str,
    path: str | os.PathLike[str] | None = None,
    group: dist.ProcessGroup | None = None,
    remote: Remote | None = None,
) -> ResumePoint | None:
    """Where to resume, the same on all ranks; every file of the answer is verified. Collective.

    resume: 'auto', from the newest whole checkpoint, None where there is none at all; 'must', the same but
    fatal where there is none; 'never', None, fatal where there are checkpoints.
    path: this checkpoint and no other; fatal if it is not whole.
    remote: checkpoints lie on an object store too. The newest of both counts; the store's is brought to `folder`.
    Raises CheckpointError listing what was found, or saying that the store cannot be reached.
    """
    ranks = Ranks(group)
    if resume == "never":
        ranks.on_first(lambda: _refuse_existing(folder, remote))
        return None
    if path is not None:
        return ResumePoint(Path(path), verify(path, group), ())
    candidates, problems = ranks.on_first(lambda: _candidates(folder, remote))
    passed_over = [*problems]
    for candidate in candidates:
        found = _take(candidate, folder, remote, ranks, group)
        if isinstance(found, Manifest):
            return ResumePoint(folder.folder / candidate.name, found, tuple(passed_over))
        passed_over.append(found)
    if not passed_over and resume == "auto":
        return None
    places = str(folder.folder) + (f" and {remote.store.url}" if remote is not None else "")
    said = "; ".join(passed_over[:4]) if passed_over else ranks.on_first(lambda: _inventory(folder.folder, remote))
    raise CheckpointError(
        f"resume: {resume}, but {places} has no whole checkpoint; found: {said}",
        "a run that is to go on needs a whole checkpoint",
        "give the run_dir of the run to resume, or start anew in another run_dir",
    )


def _take(
    candidate: _Candidate,
    folder: CheckpointFolder,
    remote: Remote | None,
    ranks: Ranks,
    group: dist.ProcessGroup | None,
) -> Manifest | str:
    """The verified manifest, or why this one is passed over."""
    path = folder.folder / candidate.name
    if not candidate.in_folder:
        assert remote is not None, "only a store's checkpoints are not in the folder"
        return fetch(remote.store, candidate.name, path, ranks, remote.sites)
    try:
        return verify(path, group)
    except CheckpointError as error:
        return error.got


def _candidates(folder: CheckpointFolder, remote: Remote | None) -> tuple[list[_Candidate], list[str]]:
    """Newest first, and what is wrong with those that are not whole. Rank 0, when nobody writes."""
    folder.clean()
    found, problems = [], []
    if remote is None or remote.sites.shared:
        for listed in folder.list():
            if listed.manifest is not None and listed.whole:
                found.append(_Candidate((listed.manifest.created.timestamp(), listed.manifest.step), True, listed.name))
            else:
                problems.append(f"checkpoint {listed.path} is damaged: {listed.problem}")
    if remote is not None:
        remote.store.clean()
        for stored in remote.store.list():
            if stored.problem is None:
                found.append(_Candidate(stored.age, False, stored.name))
            else:
                problems.append(f"checkpoint {remote.store.objects.where(stored.name)} is damaged: {stored.problem}")
    return sorted(found, key=lambda one: (one.age, one.in_folder), reverse=True), problems[::-1]


def _refuse_existing(folder: CheckpointFolder, remote: Remote | None) -> None:
    held: list[tuple[object, list[str]]] = [(folder.folder, [str(entry) for entry in folder.list()])]
    if remote is not None:
        held.append((remote.store.url, [str(entry) for entry in remote.store.list()]))
    for place, names in held:
        if names:
            got = f"resume: never, but {place} holds {', '.join(names[-8:])}"
            remedy = (
                "set another run_dir (and checkpoint.store), or resume=auto"
                if remote
                else "set another run_dir or resume=auto"
            )
            raise CheckpointError(got, "a fresh run does not write over another", remedy)


def _inventory(path: Path, remote: Remote | None) -> str:
    """What is where checkpoints were expected."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    return f"{names} in {path}" + (f"; {remote.store.inventory()}" if remote is not None else "")
