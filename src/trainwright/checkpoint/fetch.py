"""From an object store to the run's folder: a checkpoint is downloaded, verified and committed as a save is.

Collective. Where the ranks see several folders (machines without shared storage) each of these gets the whole
checkpoint; its ranks share out the files. Files that lie there already and are the right ones are not downloaded.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from trainwright import storage
from trainwright.checkpoint import folder
from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import CheckpointError, DamagedObjectError
from trainwright.guard.shared_folder import Sites

__all__ = ["fetch"]


def fetch(store: CheckpointStore, name: str, path: Path, ranks: Ranks, sites: Sites) -> Manifest | str:
    """Brings the checkpoint `name` to `path`: its manifest, or what is wrong with what lies on the store.

    Raises CheckpointError, the same on all ranks, for everything that is not the checkpoint's fault: a store that
    cannot be reached, a full disk.
    """
    data = ranks.on_first(lambda: store.manifest_bytes(name))
    where = store.objects.where(name)
    try:
        manifest = parse_manifest(data, where)
    except CheckpointError as error:
        return error.got
    temporary = folder.temporary_path(path, "writing", ranks.on_first(lambda: secrets.token_hex(4)))
    members = sites.members(ranks.rank)
    first = members[0] == ranks.rank
    ranks.everywhere(lambda: _open_temporary(path, temporary, manifest) if first else None)
    try:
        files = sorted(manifest.files, key=lambda file: -manifest.files[file].size_bytes)
        mine = files[members.index(ranks.rank) :: len(members)]
        found = ranks.everywhere(
            lambda: [_bring(store, name, file, manifest.files[file], temporary, path) for file in mine]
        )
        problems = sorted({problem for part in found for problem in part if problem})
        if problems:
            return f"checkpoint {where} is damaged: {'; '.join(problems[:4])}"
        ranks.everywhere(lambda: _commit(data, temporary, path) if first else None)
    finally:
        if first:
            folder.in_progress.discard(temporary)
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _open_temporary(path: Path, temporary: Path, manifest: Manifest) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.refuse_foreign(path)
    free = storage.free_bytes(path.parent)
    if free < manifest.size_bytes:
        got = f"{path.parent} has {free / 1e9:.2f} GB free, {path.name} on the store takes {manifest.size_bytes / 1e9:.2f} GB"
        raise CheckpointError(got, "a checkpoint is brought from the store whole", "free space, or another run_dir")
    folder.in_progress.add(temporary)
    temporary.mkdir()


def _bring(store: CheckpointStore, name: str, file: str, entry: FileEntry, temporary: Path, path: Path) -> str | None:
    """One file, from the folder that is there or from the store. What is wrong with the stored one, or None."""
    here = path / file
    with contextlib.suppress(OSError):
        if folder.size_problem(path, file, entry) is None and storage.sha256_file(here) == entry.sha256:
            os.link(here, temporary / file)
            return None
    try:
        store.objects.download(f"{name}/{file}", temporary / file, entry.size_bytes, entry.sha256)
    except DamagedObjectError as error:
        return error.got
    return None


def _commit(manifest: bytes, temporary: Path, path: Path) -> None:
    storage.atomic_write_bytes(temporary / MANIFEST_NAME, manifest)
    folder.replace_folder(temporary, path)
