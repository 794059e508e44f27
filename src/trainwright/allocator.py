"""What the C library does with memory that a process frees: kept for speed, or given back where memory is short. Imports
the standard library alone.

glibc gives back blocks of over 32 MB at once, and the top of its heap when 64 MB of it are free. A training step frees and
asks for more than that many times: each time the kernel maps, clears and hands out the pages anew, some percent of a step.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MB = 1 << 20


def keep_freed_memory() -> bool:
    """Lets the heap hold blocks of up to 128 MB (32 where this glibc takes no more) and keep up to 1 GB of free memory at its
    top. Larger blocks are still mapped one by one and given back. mallopt(3).

    Nothing is done, and False returned, without glibc or where a MALLOC_ variable says what is wanted.
    """
    library = _glibc()
    if library is None:
        return False
    held = any(library.mallopt(_MMAP_THRESHOLD, size * _MB) for size in (128, 32))
    return held and bool(library.mallopt(_TRIM_THRESHOLD, 1024 * _MB))


def give_back_freed_memory() -> bool:
    """Has blocks of 0.5 MB and more returned to the system as they are freed: gathered parameters and gradients of a few MB,
    freed between others that stay, otherwise take up to twice their size. mallopt(3); left alone as above.
    """
    library = _glibc()
    if library is None:
        return False
    return bool(library.mallopt(_MMAP_THRESHOLD, _MB // 2)) and bool(library.mallopt(_TRIM_THRESHOLD, _MB))


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and the user has not set its allocator."""
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
