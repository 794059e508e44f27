"""An object store's prefix (`s3://bucket/runs/mine`, or any URL that fsspec knows) as a folder of whole objects.

An object store has no rename and no append: an object appears whole when its upload ends, under its own name. So
every write here is checked after it (size, SHA-256 of what is read back) and every read against what was written;
whoever needs several objects to appear together writes the one that names the others last.

Calls that fail for a reason that may pass (a cut connection, a busy server, bytes that arrived changed) are made
again with growing waits. Content is streamed in pieces; nothing larger than a manifest is held in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from trainwright.errors import DamagedObjectError, StorageError
from trainwright.storage import local
from trainwright.storage.object_errors import explain, passes

__all__ = ["ObjectStore", "Retry"]

T = TypeVar("T")
_PIECE_BYTES = 8 << 20
_PARTS_AT_ONCE = 4  # of 50 MiB each, of an upload: what a rank holds in memory
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 20, 60


@dataclass(frozen=True)
class Retry:
    """How often a call is made, and the waits between: first_wait_s, doubled each time, at most longest_wait_s, each
    shortened by up to half at random so that many ranks do not come back at once. The defaults bear a minute."""

    attempts: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def waits(self) -> Iterator[float]:
        """Seconds before the second call, the third, ..."""
        for attempt in range(self.attempts - 1):
            yield min(self.longest_wait_s, self.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)


class ObjectStore:
    """Objects below `url`, by their relative names (`step-00000100/manifest.json`). All errors are StorageError."""

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        self.url = url.rstrip("/")
        self.retry = retry or Retry()
        options: dict[str, Any] = {"use_listings_cache": False}
        if self.url.split("://")[0] in ("s3", "s3a"):
            # A connection that says nothing is cut, and the call made again: the default waits for ever.
            options["config_kwargs"] = {
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "read_timeout": _READ_TIMEOUT_S,
                "retries": {"mode": "standard", "total_max_attempts": 2},  # ours come on top
            }
            options["max_concurrency"] = _PARTS_AT_ONCE
        try:
            import fsspec

            self._filesystem, root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise explain(error, self.url, "opening") from None
        self._root = str(root).rstrip("/")
        self._is_local = "file" in _protocols(self._filesystem)

    def where(self, name: str = "") -> str:
        """The whole URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Objects whose name begins with the folder `prefix` (empty: all), with their sizes in bytes."""

        def find() -> dict[str, int]:
            self._filesystem.invalidate_cache()
            folder = self._key(prefix)
            try:
                found = self._filesystem.find(folder, detail=True)
            except FileNotFoundError:
                return {}
            base = self._root.lstrip("/")
            return {key.lstrip("/").removeprefix(base).lstrip("/"): int(info["size"]) for key, info in found.items()}

        return self._call("listing", prefix, find)

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        return self._call("looking for", name, lambda: bool(self._filesystem.isfile(self._key(name))))

    def read_bytes(self, name: str, max_bytes: int) -> bytes | None:
        """The whole object, which must not be larger than `max_bytes`; None if it is not there."""

        def read() -> bytes | None:
            try:
                with self._open(name) as stream:
                    return stream.read(max_bytes + 1)
            except FileNotFoundError:
                return None

        data = self._call("reading", name, read)
        if data is not None and len(data) > max_bytes:
            raise StorageError(f"{self.where(name)} is larger than {max_bytes:,} bytes", "a manifest is a small file")
        return data

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes an object in one piece and reads it back. What was there of that name is replaced."""

        def write() -> None:
            if self._is_local:  # a file system's write can stop halfway
                Path(self._key(name)).parent.mkdir(parents=True, exist_ok=True)
                local.atomic_write_bytes(self._key(name), data)
            else:
                self._filesystem.pipe_file(self._key(name), data)
            self._check(name, len(data), hashlib.sha256(data).hexdigest())

        self._call("writing", name, write)

    def upload(self, path: Path, name: str, size_bytes: int, sha256: str) -> None:
        """Copies a local file to an object and proves that it arrived: its size, and its hash read back."""

        def put() -> None:
            if self._is_local:
                Path(self._key(name)).parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.put_file(os.fspath(path), self._key(name))
            self._check(name, size_bytes, sha256)

        self._call("writing", name, put)

    def download(self, name: str, path: Path, size_bytes: int, sha256: str) -> None:
        """Copies an object to a new local file, on the disk when this returns. Raises DamagedObjectError, and leaves no
        file, where the object is not there or is not of this size and hash."""

        def get() -> None:
            try:
                with local.atomic_write(path) as target:
                    self._compare(name, size_bytes, sha256, target)
            except FileNotFoundError:
                raise DamagedObjectError(
                    f"{self.where(name)} is missing", "the objects that a manifest names are there"
                ) from None

        self._call("reading", name, get)

    def copy(self, source: str, target: str) -> None:
        """Copies an object inside the store, without its content passing through this machine where the store can."""

        def copy() -> None:
            if self._is_local:
                Path(self._key(target)).parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.cp_file(self._key(source), self._key(target))

        self._call("copying", source, copy)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects one after another, in this order; those that are not there are passed over."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm_file(self._key(name))

        for name in names:
            self._call("deleting", name, partial(remove, name))

    def check(self, writable: bool = True) -> None:
        """Proves, before anything depends on it, that the store can be listed and (`writable`) written and deleted."""
        once = ObjectStore(self.url, Retry(attempts=2))
        name = f".trainwright-{random.randbytes(6).hex()}"
        if not writable:
            once._call("listing", "", once._list_bucket)
            return
        once.write_bytes(name, b"trainwright looks whether it may write here\n")
        once.delete([name])

    def _list_bucket(self) -> None:
        """Raises FileNotFoundError where there is no such bucket; an empty prefix is none yet, and that is fine."""
        try:
            self._filesystem.ls(self._root.lstrip("/").split("/")[0], detail=False)
        except FileNotFoundError as error:
            if "bucket" in str(error).lower():
                raise

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _open(self, name: str) -> IO[bytes]:
        # No cache of fsspec's own: each read is one request, and a piece is held once.
        return self._filesystem.open(self._key(name), "rb", block_size=_PIECE_BYTES, cache_type="none")

    def _check(self, name: str, size_bytes: int, sha256: str) -> None:
        self._filesystem.invalidate_cache()
        self._compare(name, size_bytes, sha256, None)

    def _compare(self, name: str, size_bytes: int, sha256: str, target: IO[bytes] | None) -> None:
        """Reads an object through (into `target`); raises _ChangedError where it is not what it should be."""
        digest, received = hashlib.sha256(), 0
        with self._open(name) as stream:
            while received <= size_bytes and (piece := stream.read(_PIECE_BYTES)):
                received += len(piece)
                digest.update(piece)
                if target is not None:
                    target.write(piece)
        if received != size_bytes:
            raise _ChangedError(f"{self.where(name)} has {received:,} of {size_bytes:,} bytes")
        if digest.hexdigest() != sha256:
            raise _ChangedError(f"{self.where(name)} does not match its SHA-256")

    def _call(self, doing: str, name: str, action: Callable[[], T]) -> T:
        waits = self.retry.waits()
        changed = 0
        while True:
            try:
                return action()
            except Exception as error:
                wait_s = next(waits, None)
                # What lies in the store changed does not heal by reading it for a minute: a second look, and no more.
                changed += isinstance(error, _ChangedError)
                if wait_s is None or not passes(error) or changed > 2:
                    if isinstance(error, _ChangedError):
                        raise _of_change(error) from None
                    raise explain(error, self.where(name), doing) from error
            time.sleep(wait_s)


class _ChangedError(OSError):
    """The store gave other bytes than it should."""


def _of_change(error: _ChangedError) -> DamagedObjectError:
    rule = "an object is as long as, and hashes to, what its manifest says"
    return DamagedObjectError(str(error), rule, "look at who else writes to that prefix; upload it again")


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
