"""Saving to an object store: beside the run's folder where all ranks see that, instead of it where they do not.

All ranks on one folder: the checkpoint is committed there as ever, then every rank uploads the file that it wrote, and
rank 0 writes the manifest when all have arrived. A store that cannot be reached does not stop the run: its checkpoint
is whole on the disk; the failure is told, and a later save (or the end of the run) makes up for it.

Ranks on several folders (machines without shared storage): no folder holds the whole. Every rank writes its file to
its own machine's disk, uploads it and deletes it; a failure is the save's. Collective, in the saver's thread.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from trainwright import storage
from trainwright.checkpoint import folder
from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, read_manifest_file
from trainwright.checkpoint.save import OnCommit, PlannedSave, manifest_of, shard_name, write_own, write_planned
from trainwright.checkpoint.store import BEST, CheckpointStore
from trainwright.errors import CheckpointError

__all__ = ["StoreWriter"]


class StoreWriter:
    """A `Writer` for `save` and `AsyncSaver`. shared: all ranks see the folder that checkpoints are written to."""

    def __init__(self, store: CheckpointStore, shared: bool) -> None:
        self.store, self.shared = store, shared
        self.missing: Path | None = None
        """A checkpoint that is whole on the disk and not on the store; the same on all ranks."""
        self.problem = ""
        """Why it is not."""
        self.as_best = False
        """The save in hand becomes the store's `best` as well."""
        self._best_missing = False

    def __call__(self, planned: PlannedSave, ranks: Ranks, on_commit: OnCommit | None) -> None:
        if not self.shared:
            self._write_straight(planned, ranks)
        else:
            write_planned(planned, ranks)
            self.missing = planned.path
            with contextlib.suppress(CheckpointError):  # kept as `problem`
                self.make_up(ranks)
        if on_commit is not None:
            ranks.on_first(lambda: on_commit(planned.path))

    def make_up(self, ranks: Ranks) -> None:
        """Uploads the checkpoint that is missing on the store, if one is. Collective. Raises CheckpointError."""
        path = self.missing
        if path is None:
            return
        try:
            self._copy(path, ranks)
        except CheckpointError as error:
            self.problem = error.got
            self._best_missing |= self.as_best
            raise
        self.missing, self.problem, self._best_missing = None, "", False

    def resumed_from(self, path: Path, ranks: Ranks) -> None:
        """A run goes on from a checkpoint: if the store has it not (a run that was killed between commit and upload),
        it is made up for like any that is missing. Collective."""
        if self.shared and ranks.on_first(lambda: not self._has(path)):
            self.missing = path

    def _has(self, path: Path) -> bool:
        stored = self.store.look(path.name)
        return stored.problem is None and stored.manifest == read_manifest_file(path)

    def _copy(self, path: Path, ranks: Ranks) -> None:
        def begin() -> dict[str, FileEntry]:
            files = read_manifest_file(path).files
            self.store.begin(path.name)
            return files

        files = ranks.on_first(begin)
        # Each rank what it wrote itself: it lies in its machine's page cache. A resume on fewer ranks has others' too.
        mine = {name: entry for place, (name, entry) in enumerate(files.items()) if place % ranks.size == ranks.rank}
        ranks.everywhere(lambda: self._upload(path, mine, path.name))
        folder.reached("objects uploaded")
        manifest = path / MANIFEST_NAME
        ranks.on_first(lambda: self._commit(path.name, storage.read_bytes(manifest, MAX_MANIFEST_BYTES), path.parent))

    def _commit(self, name: str, manifest: bytes, parent: Path | None = None) -> None:
        """On rank 0. parent: the run's folder of checkpoints, where all ranks see it."""
        self.store.commit(name, manifest)
        if self.as_best:
            self.store.keep_as_best(name)
        elif self._best_missing and parent is not None:  # one since then was not uploaded; the folder has it
            self._upload_best(parent / BEST)
        self.store.prune()

    def _upload_best(self, best: Path) -> None:
        self.store.begin(BEST)
        self._upload(best, read_manifest_file(best).files, BEST)
        self.store.commit(BEST, storage.read_bytes(best / MANIFEST_NAME, MAX_MANIFEST_BYTES))

    def _write_straight(self, planned: PlannedSave, ranks: Ranks) -> None:
        name = planned.path.name
        token = ranks.on_first(lambda: self._begin_straight(name))
        staging = folder.temporary_path(planned.path, "writing", token)
        folder.in_progress.add(staging)
        try:
            parts = ranks.everywhere(lambda: self._stage_and_upload(staging, planned, ranks.rank))
            folder.reached("objects uploaded")
            files = {file: entry for part in parts for file, entry in part.items()}
            ranks.on_first(lambda: self._commit(name, manifest_of(planned, files, ranks.size)))
        finally:
            folder.in_progress.discard(staging)
            with contextlib.suppress(OSError):
                staging.rmdir()  # the last rank of the machine

    def _begin_straight(self, name: str) -> str:
        self.store.begin(name)
        return secrets.token_hex(4)

    def _stage_and_upload(self, staging: Path, planned: PlannedSave, rank: int) -> dict[str, FileEntry]:
        staging.mkdir(parents=True, exist_ok=True)
        own_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in planned.chunks)
        free = storage.free_bytes(staging)
        if free < own_bytes:
            got = f"{staging.parent} has {free / 1e9:.2f} GB free, this rank's file takes {own_bytes / 1e9:.2f} GB"
            raise CheckpointError(got, "a file is written to the disk before it is uploaded", "free space")
        try:
            entries = write_own(staging, planned, rank)
            self._upload(staging, entries, planned.path.name)
        finally:
            with contextlib.suppress(OSError):
                (staging / shard_name(rank)).unlink()
        return entries

    def _upload(self, source: Path, files: Mapping[str, FileEntry], name: str) -> None:
        for file, entry in files.items():
            self.store.objects.upload(source / file, f"{name}/{file}", entry.size_bytes, entry.sha256)


def clean_staging(path: Path) -> None:
    """Deletes what killed saves staged in a folder that this machine alone sees. At the start of a run."""
    if path.is_dir():
        for entry, _, _ in tuple(folder.leftovers(path)):
            shutil.rmtree(entry, ignore_errors=True)
