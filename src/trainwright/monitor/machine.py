"""The machine in a few facts, for the report and doctor. Reads files; imports nothing slow."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from . import words


def cpu_name() -> str:
    """The processor's marketing name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_limit_bytes() -> tuple[int, bool]:
    """Memory that this process may use, and whether a container's limit (cgroup) sets it rather than the machine."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(path).read_text())
            if limit < total:
                return limit, True
    return total, False


def version_of(package: str) -> str | None:
    """The installed version of a package without importing it; None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, str]:
    """Name → value, ready to be shown. GPUs are named only if torch is loaded already."""
    limit_bytes, by_container = memory_limit_bytes()
    facts = {
        "Processor": f"{cpu_name()}, {os.cpu_count()} logical cores",
        "Memory": words.byte_size(limit_bytes) + (" (container limit)" if by_container else ""),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["GPUs"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    facts["System"] = f"{platform.system()} {platform.release()}"
    facts["Python"] = platform.python_version()
    facts["PyTorch"] = version_of("torch") or "not installed"
    facts["Trainwright"] = version_of("trainwright") or "not installed"
    return facts
