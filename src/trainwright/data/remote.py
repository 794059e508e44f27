"""A token data set on an object store: uploaded with its manifest last, downloaded once a machine, by its version.

    <cache>/<version>/                 the data set, as a folder that `TokenDataset.open` takes
    <cache>/.<version>.lock            held by the one process that downloads; the others of the machine wait for it
    <cache>/.<version>.downloading/    what it has so far; a download that was killed goes on from there

Memory maps need local files, so a set is downloaded whole before the first step: each file is hashed on its way, and
the folder gets its name when all are there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from trainwright import storage
from trainwright.data.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from trainwright.errors import DataError
from trainwright.storage.objects import ObjectStore

__all__ = ["default_cache", "local_copy", "upload"]

VARIABLE = "TRAINWRIGHT_CACHE"


def default_cache() -> Path:
    """$TRAINWRIGHT_CACHE, or `trainwright` under $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trainwright"


def local_copy(url: str, cache: str | Path | None = None) -> Path:
    """The folder that holds the data set at `url` on this machine; downloads it if it is not there yet.

    Raises StorageError (no such bucket, no credentials, no package, an object that is not what the manifest says) and
    DataError (no data set there, a damaged manifest, too little space).
    """
    store = ObjectStore(url)
    manifest, content = _manifest_of(store)
    folder = (Path(cache).expanduser() if cache is not None else default_cache()).absolute()
    target = folder / manifest.version
    if _is_whole(target, manifest):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{manifest.version}.lock", url):
            if not _is_whole(target, manifest):  # another process may have downloaded it meanwhile
                _download(store, manifest, content, target)
    except OSError as error:
        got = f"{url} cannot be kept in {folder}: {error}"
        raise DataError(got, "the cache is a folder that can be written", "data.cache=FOLDER") from None
    return target


def upload(folder: str | Path, url: str) -> Manifest:
    """Copies a data set to `url`, every object checked after it arrived, the manifest last. Raises DataError where
    `folder` is no whole data set, StorageError where the store fails."""
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    store = ObjectStore(url)
    for entry in manifest.files():
        if (found := FileEntry.of(folder, entry.file)) != entry:
            got = f"{folder / entry.file} has {found.bytes:,} bytes and the SHA-256 {found.sha256}"
            raise DataError(got, f"{MANIFEST} says {entry.bytes:,} and {entry.sha256}", "prepare the data set again")
    store.check()
    store.delete([MANIFEST])
    for entry in manifest.files():
        store.upload(folder / entry.file, entry.file, entry.bytes, entry.sha256)
    store.write_bytes(MANIFEST, storage.read_bytes(folder / MANIFEST, MAX_MANIFEST_BYTES))
    return manifest


def _manifest_of(store: ObjectStore) -> tuple[Manifest, bytes]:
    content = store.read_bytes(MANIFEST, MAX_MANIFEST_BYTES)
    if content is None:
        store.check(writable=False)  # it may be the bucket that is not there
        raise DataError(
            f"no token data set at {store.url}: no {MANIFEST}",
            f"a data set on a store is a prefix with a {MANIFEST}",
            f"trainwright data push FOLDER {store.url}",
        )
    return parse_manifest(content, store.url), content


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder has the manifest's files with their sizes; they were hashed when they came."""
    try:
        return read_manifest(folder).version == manifest.version and all(
            storage.size_bytes(folder / entry.file) == entry.bytes for entry in manifest.files()
        )
    except (DataError, OSError):
        return False


def _download(store: ObjectStore, manifest: Manifest, content: bytes, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.downloading")
    temporary.mkdir(exist_ok=True)
    missing = [entry for entry in manifest.files() if not _is_there(temporary, entry)]
    needed = sum(entry.bytes for entry in missing)
    free = storage.free_bytes(temporary)
    if free < needed:
        raise DataError(
            f"{target.parent} has {free / 1e9:.2f} GB free, {store.url} takes {needed / 1e9:.2f} GB",
            "a data set is downloaded whole before it is read",
            f"free space, or name another disk: data.cache=FOLDER (or {VARIABLE})",
        )
    print(f"downloading {store.url} ({needed / 1e6:,.1f} MB) to {target}", file=sys.stderr, flush=True)
    for entry in missing:
        (temporary / entry.file).parent.mkdir(parents=True, exist_ok=True)
        store.download(entry.file, temporary / entry.file, entry.bytes, entry.sha256)
    write_manifest(temporary, parse_manifest(content, store.url))
    if target.exists():  # damaged, or it would have been taken
        shutil.rmtree(target)
    os.rename(temporary, target)
    storage.fsync_dir(target.parent)


def _is_there(folder: Path, entry: FileEntry) -> bool:
    path = folder / entry.file
    return path.is_file() and path.stat().st_size == entry.bytes and storage.sha256_file(path) == entry.sha256


@contextlib.contextmanager
def _alone(lock: Path, url: str) -> Iterator[None]:
    """Holds the lock file; says so once when another process has it. The system releases it with its process."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: without the lock two processes may download, into one folder
        yield
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that downloads {url}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
