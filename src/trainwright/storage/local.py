"""Files and folders: atomic writes, hashes, free space, names that stay inside their folder.

What is written goes to a temporary name in the same folder, is flushed to the disk and renamed, so that a reader
(or a machine that lost its power) sees the old file or the new one, never half of one. Single files can be read from
URLs too (`https://...`, `s3://...`, through fsspec); what is written to an object store goes through `objects.py`.

Errors here are `OSError` (the disk's own) or `ValueError` (a name or a content that is refused); the rooms that
call turn them into a `DataError` or a `CheckpointError` that names the data set or the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

PathLike = str | os.PathLike[str]
_CHUNK_BYTES = 1 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: PathLike) -> bool:
    """Whether `path` names an object store (`s3://…`) and not a local file. `file://` counts as a URL too."""
    return _URL.match(os.fspath(path)) is not None


def safe_relative(path: str) -> str:
    """`path` unchanged if it is a relative POSIX path that stays inside its folder.

    Names in a manifest come from whoever wrote it: `../../etc/passwd`, `/etc/passwd`, `C:\\x`, `a//b`, `.` and
    names with control characters are refused. Raises ValueError.
    """
    parts = path.split("/") if isinstance(path, str) else []
    bad = (
        not parts
        or any(part in ("", ".", "..") for part in parts)
        or PurePosixPath(path).is_absolute()
        or bool(PureWindowsPath(path).drive)
        or "\\" in path
        or any(ord(character) < 32 for character in path)
    )
    if bad:
        raise ValueError(f"{path!r} is not a relative path inside its folder")
    return path


def fsync_file(path: PathLike) -> None:
    """Waits until the content of a local file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(path: PathLike) -> None:
    """Waits until the entries of a local folder (new names, renames) are on the disk, where the system can do it."""
    with contextlib.suppress(OSError):  # some network file systems and Windows have no fsync of folders
        fsync_file(path)


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[IO[bytes]]:
    """A binary stream whose content becomes `path` when the block ends well, and vanishes when it raises."""
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        with open(temporary, "xb") as stream:  # not mkstemp: its files can be read by their owner only
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_dir(target.parent)


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """A new local folder that becomes `path` when the block ends well, and vanishes when it raises.

    The caller syncs the files it writes (or writes them through `atomic_write`). Raises FileExistsError if `path`
    exists already: a folder is never replaced, since no file system can swap two full folders atomically.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            fsync_dir(folder)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(target.parent)


@contextlib.contextmanager
def locked_folder(path: PathLike) -> Iterator[None]:
    """Holds a local folder for this process while the block runs. Raises BlockingIOError if another one holds it.

    The lock dies with its process, kill -9 included. A system without flock does without the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: PathLike, data: bytes | memoryview) -> None:
    """Writes `data` to `path`: whole or not at all, on the disk when this returns."""
    with atomic_write(path) as stream:
        stream.write(data)


def atomic_write_json(path: PathLike, obj: Any) -> None:
    """Writes `obj` as indented JSON with sorted keys. NaN and infinity are refused (ValueError): JSON has none."""
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


def canonical_json(obj: Any) -> bytes:
    """The one byte string that stands for `obj`: sorted keys, no spaces, ASCII. What versions are hashed from."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def open_read(path: PathLike) -> IO[bytes]:
    """A binary stream of a local file or a URL's object."""
    if is_url(path):
        import fsspec

        return fsspec.open(os.fspath(path), "rb").open()
    return open(path, "rb")


def read_bytes(path: PathLike, max_bytes: int) -> bytes:
    """The whole content of a file that must not be larger than `max_bytes`. Raises ValueError if it is."""
    with open_read(path) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes} bytes")
    return data


def read_json(path: PathLike, max_bytes: int = 64 << 20) -> Any:
    """A JSON file of at most `max_bytes`. Raises ValueError if larger, not UTF-8, not JSON, nested too deep."""
    return parse_json(read_bytes(path, max_bytes), os.fspath(path))


def parse_json(data: bytes, where: str) -> Any:
    """JSON in UTF-8. Raises ValueError naming `where` for anything else."""
    try:
        return json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: PathLike) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with open_read(path) as stream:
        while count := stream.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
    return digest.hexdigest()


def size_bytes(path: PathLike) -> int:
    """Size of a file. Raises FileNotFoundError."""
    if is_url(path):
        import fsspec

        filesystem, name = fsspec.core.url_to_fs(os.fspath(path))
        return int(filesystem.size(name))
    return os.stat(path).st_size


def free_bytes(path: PathLike) -> int:
    """Bytes that may still be written where `path` is or will be (its nearest existing folder)."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
