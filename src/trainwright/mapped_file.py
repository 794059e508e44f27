"""Tensors whose memory is a file's: the operating system keeps in memory what is at work, and takes back the rest.

The files have no name: they belong to this process and vanish with it, whatever ends it, so that nobody can remove or
cut one. Their space is taken from the disk at the start, so that it cannot fill up in between.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import time
from pathlib import Path

import torch

from trainwright.errors import ConfigError

_PROBE_BYTES = 32 << 20
_IN_MEMORY = ("tmpfs", "ramfs")


class MappedFile:
    """Rows of `numel` elements in a file without a name, as tensors that share its pages."""

    def __init__(self, folder: Path, numel: int, rows: int, dtype: torch.dtype = torch.float32) -> None:
        """Takes the file's whole space from the disk, as zeros. Raises ConfigError where the disk has not enough."""
        self.folder, self._item = folder, dtype.itemsize
        pages = -(-numel * self._item // mmap.PAGESIZE)
        self._row_bytes = pages * mmap.PAGESIZE
        size = max(rows * self._row_bytes, mmap.PAGESIZE)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _take_space(file.fileno(), size, folder)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise ConfigError(
                f"offload to files: this process may not open more ({_open_files()})",
                "a parameter's states, and its shard, are a file each",
                "ulimit -Hn 65536 before the start (LimitNOFILE in a service)",
            ) from None
        self.rows = [
            torch.frombuffer(self._map, dtype=dtype, count=numel, offset=row * self._row_bytes)
            if numel
            else torch.empty(0, dtype=dtype)
            for row in range(rows)
        ]

    def ahead(self, start: int, stop: int) -> None:
        """Asks for elements start..stop of every row."""
        self._advise("MADV_WILLNEED", start, stop)

    def let_go(self, start: int, stop: int) -> None:
        """Elements start..stop of every row need not stay in memory; what was written is kept."""
        self._advise("MADV_DONTNEED", start, stop)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        option = getattr(mmap, advice, None)  # absent outside Unix: the kernel finds out for itself
        first, last = start * self._item // mmap.PAGESIZE, -(-stop * self._item // mmap.PAGESIZE)
        last = min(last, self._row_bytes // mmap.PAGESIZE)
        if option is None or last <= first or not self.rows[0].numel():
            return
        for row in range(len(self.rows)):
            self._map.madvise(option, row * self._row_bytes + first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _take_space(descriptor: int, size: int, folder: Path) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        free = os.statvfs(folder)
        raise ConfigError(
            f"offload.path={folder}: {size / 1e6:,.1f} MB more for states or parameters, {free.f_bavail * free.f_frsize / 1e6:,.1f} MB "
            f"are free ({error.strerror})",
            "the whole space is taken before training starts, so that a full disk cannot end it",
            "another offload.path, or more ranks, of which each keeps a share",
        ) from None


def _open_files() -> str:
    import resource

    return f"ulimit -n {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"


def allow_open_files() -> None:
    """As many as the system lets this process open: the usual limit of 1,024 is less than a model's parameters."""
    try:
        import resource
    except ImportError:  # outside Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def offload_folder(path: str | None, run_dir: str | None) -> Path:
    """The folder for the files; raises ConfigError where it cannot be written to."""
    folder = Path(path or (Path(run_dir) / "offload" if run_dir else tempfile.gettempdir()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"offload.path={folder}: {error.strerror}",
            "a folder that this user can write to, on a local disk",
            "offload.path=/local_nvme/offload",
        ) from None
    return folder


def disk_speed(folder: Path) -> tuple[float, float]:
    """(reading, writing) in bytes/s: 32 MB, written through to the disk and read again without the page cache."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(_PROBE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())
        wrote = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(1 << 20):
            pass
        done = time.perf_counter()
    return _PROBE_BYTES / max(done - wrote, 1e-6), _PROBE_BYTES / max(wrote - began, 1e-6)


def lies_in_memory(folder: Path) -> bool:
    """Whether `folder` is on a file system in memory, where nothing is gained; False where that cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    place = str(folder.resolve())
    points = [(m[1], m[2]) for m in mounts if place == m[1] or place.startswith(m[1].rstrip("/") + "/")]
    return bool(points) and max(points, key=lambda point: len(point[0]))[1] in _IN_MEMORY
