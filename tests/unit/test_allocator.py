"""Memory that a step frees and asks for again stays with the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

# Resident MB after 24 blocks of 8 MB have come and gone. Whole pages are written, as a tensor's would be.
PROBE = """
import ctypes, sys
from pathlib import Path
from trainwright.allocator import give_back_freed_memory, keep_freed_memory

done = keep_freed_memory() if sys.argv[1] != "plain" else False
if sys.argv[1] == "back":
    done = give_back_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
blocks = [ctypes.c_void_p(library.malloc(ctypes.c_size_t(8 << 20))) for _ in range(24)]
for block in blocks:
    ctypes.memset(block, 1, 8 << 20)
for block in reversed(blocks):
    library.free(block)
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(int(done), pages * 4096 >> 20)
"""
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library")


def _probe(mode: str, **environment: str) -> tuple[int, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, mode], capture_output=True, text=True, env=clean | environment, check=True
    )
    first, second = done.stdout.split()
    return int(first), int(second)


def test_freed_blocks_stay_with_the_process() -> None:
    done, kept = _probe("keep")
    assert done == 1
    assert kept > _probe("plain")[1] + 100
    assert _probe("back") == (1, pytest.approx(_probe("plain")[1], abs=20))


def test_what_the_user_set_is_left_alone() -> None:
    done, left = _probe("keep", MALLOC_ARENA_MAX="2")
    assert done == 0
    assert left < _probe("keep")[1] - 100
    assert _probe("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == 0
