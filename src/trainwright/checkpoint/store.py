"""A run's checkpoints on an object store: `s3://bucket/run/step-00000100/`, with the files that a local folder has.

    step-00000100/rank-00000.safetensors   uploaded and checked, each by the rank that wrote it
    step-00000100/manifest.json            written last, when all of them have arrived: it is what makes the checkpoint

An object store has no rename. So the manifest commits: without it a prefix is not a checkpoint, whatever lies there.
It is deleted first when a checkpoint goes, and before objects under it are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainwright import storage
from trainwright.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest
from trainwright.errors import CheckpointError
from trainwright.storage.objects import ObjectStore, Retry

__all__ = ["BEST", "CheckpointStore", "StoredCheckpoint"]

BEST = "best"
_NAME = re.compile(r"(step-\d{8,}|best)\Z")
_STEP = re.compile(r"step-\d{8,}\Z")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on the store at first sight: its manifest, and whether its objects are as long as they should be."""

    name: str
    manifest: Manifest | None
    problem: str | None
    """Why it is not whole; None if it is."""

    @property
    def age(self) -> tuple[float, int]:
        """Sorts by the time of the save."""
        return (self.manifest.created.timestamp(), self.manifest.step) if self.manifest is not None else (0.0, -1)

    def __str__(self) -> str:
        return self.name if self.problem is None else f"{self.name} (damaged: {self.problem})"


class CheckpointStore:
    """The checkpoints below `url`. Nothing here is collective; what changes the store is rank 0's, but for `upload`.

    keep, keep_every: as those of the run's folder.
    """

    def __init__(self, url: str, keep: int = 0, keep_every: int = 0, retry: Retry | None = None) -> None:
        self.objects = ObjectStore(url, retry)
        self.url = self.objects.url
        self.keep, self.keep_every = keep, keep_every
        self.protected: frozenset[str] = frozenset()
        """Names of checkpoints that stay whatever the rules say."""

    def list(self) -> tuple[StoredCheckpoint, ...]:
        """The `step-` checkpoints that have a manifest, whole and damaged, oldest first."""
        sizes = self.objects.sizes()
        names = {name.split("/")[0] for name in sizes if name.endswith(f"/{MANIFEST_NAME}")}
        found = [self._look(name, sizes) for name in names if _STEP.match(name)]
        return tuple(sorted(found, key=lambda checkpoint: checkpoint.age))

    def look(self, name: str) -> StoredCheckpoint:
        """One of them."""
        return self._look(name, self.objects.sizes(name))

    def _look(self, name: str, sizes: Mapping[str, int]) -> StoredCheckpoint:
        try:
            manifest = self.manifest(name)
        except CheckpointError as error:
            return StoredCheckpoint(name, None, error.got)
        problems = []
        for file, entry in manifest.files.items():
            found = sizes.get(f"{name}/{file}")
            if found is None:
                problems.append(f"{file} is missing")
            elif found != entry.size_bytes:
                problems.append(f"{file} has {found:,} of {entry.size_bytes:,} bytes")
        return StoredCheckpoint(name, manifest, "; ".join(problems[:4]) or None)

    def manifest(self, name: str) -> Manifest:
        """The manifest of a checkpoint. Raises CheckpointError where there is none, or a damaged one."""
        return parse_manifest(self.manifest_bytes(name), self.objects.where(f"{name}/{MANIFEST_NAME}"))

    def manifest_bytes(self, name: str) -> bytes:
        """The same as it lies there, its seal not looked at."""
        data = self.objects.read_bytes(f"{name}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES)
        if data is None:
            got = f"{self.objects.where(name)} has no {MANIFEST_NAME}"
            raise CheckpointError(got, "a checkpoint on a store is what its manifest names", "take another checkpoint")
        return data

    def begin(self, name: str) -> None:
        """Before objects of a checkpoint are written: one that is there is none from now on."""
        assert _NAME.match(name), f"{name} is not the name of a checkpoint"
        self.objects.delete([f"{name}/{MANIFEST_NAME}"])

    def commit(self, name: str, manifest: bytes) -> None:
        """After all objects have arrived: the checkpoint exists when this returns."""
        self.objects.write_bytes(f"{name}/{MANIFEST_NAME}", manifest)

    def remove(self, name: str) -> None:
        """Deletes a checkpoint: its manifest first, so that no half of it is ever taken for whole."""
        files = [storage.safe_relative(file) for file in self.objects.sizes(name)]
        self.objects.delete(sorted(files, key=lambda file: (not file.endswith(f"/{MANIFEST_NAME}"), file)))

    def clean(self) -> tuple[str, ...]:
        """Deletes objects of saves that never were committed; their names. Only when nobody else writes here."""
        sizes = self.objects.sizes()
        whole = {name.split("/")[0] for name in sizes if name.endswith(f"/{MANIFEST_NAME}")}
        doomed = sorted({folder for name in sizes if _NAME.match(folder := name.split("/")[0])} - whole)
        for name in doomed:
            self.remove(name)
        return tuple(doomed)

    def prune(self) -> tuple[str, ...]:
        """Deletes whole checkpoints beyond `keep` and `keep_every`; damaged ones stay to be looked at."""
        if self.keep == 0:
            return ()
        doomed = []
        for checkpoint in [found for found in self.list() if found.problem is None][: -self.keep]:
            assert checkpoint.manifest is not None, "a whole checkpoint has a manifest"
            step = checkpoint.manifest.step
            if checkpoint.name in self.protected or (self.keep_every and step % self.keep_every == 0):
                continue
            self.remove(checkpoint.name)
            doomed.append(checkpoint.name)
        return tuple(doomed)

    def keep_as_best(self, name: str) -> None:
        """Makes `best` a checkpoint of its own with the content of `name`, copied inside the store."""
        data = self.manifest_bytes(name)
        files = parse_manifest(data, self.objects.where(name)).files
        before = self.objects.sizes(BEST)
        self.begin(BEST)
        for file in files:
            self.objects.copy(f"{name}/{file}", f"{BEST}/{file}")
        self._check_sizes(BEST, files)
        self.commit(BEST, data)
        # Of a save on more ranks.
        kept = {f"{BEST}/{file}" for file in [*files, MANIFEST_NAME]}
        self.objects.delete(sorted(before.keys() - kept))

    def _check_sizes(self, name: str, files: Mapping[str, FileEntry]) -> None:
        sizes = self.objects.sizes(name)
        wrong = [file for file, entry in files.items() if sizes.get(f"{name}/{file}") != entry.size_bytes]
        if wrong:
            raise CheckpointError(f"{self.objects.where(name)}: {wrong[0]} was not copied whole", "a copy is whole")

    def inventory(self) -> str:
        """What is there, for messages."""
        names: Iterable[str] = [str(checkpoint) for checkpoint in self.list()] or [*self.objects.sizes()][:8]
        return f"{', '.join(names) or 'nothing'} in {self.url}"
