"""What memory and disk this machine has left for a run, and the refusal of one that cannot fit."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from trainwright.config import Config
from trainwright.dry_run.run import DryRun
from trainwright.errors import ConfigError
from trainwright.monitor.words import byte_size
from trainwright.storage import free_bytes

_SPARED = 0.95
"""Share of the free memory that a plan may fill: the rest of the machine goes on living."""


@dataclass(frozen=True)
class Room:
    """For one rank."""

    memory_bytes: int
    where: str
    """Whose limit it is, such as "2 ranks share 23 GiB that are free here"."""


def room_for(local_ranks: int) -> Room:
    """The host's memory that one of `local_ranks` ranks of this machine may take."""
    free, container = free_memory_bytes()
    limit = " under the container's limit" if container else ""
    share = f"{local_ranks} ranks share {byte_size(free)}" if local_ranks > 1 else byte_size(free)
    return Room(int(free * _SPARED / local_ranks), f"{share} that are free here{limit}")


def free_memory_bytes() -> tuple[int, bool]:
    """Memory that processes of this machine can still take, and whether a container's limit (cgroup) sets it."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used, cache in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes", "total_inactive_file"),
    ):  # fmt: skip
        with contextlib.suppress(OSError, ValueError, KeyError):
            taken = int(Path(used).read_text())
            statistics = dict(line.split() for line in Path(used).with_name("memory.stat").read_text().splitlines())
            left = int(Path(limit).read_text()) - taken + int(statistics[cache])  # files can be dropped
            if left < free:
                return max(0, left), True
    return free, False


def checkpoint_bytes(run: DryRun) -> int:
    """Of one checkpoint: masters and optimizer states of the whole model."""
    states = sum(row.between_steps_bytes for row in run.memory if row.kind in ("parameters", "optimizer", "average"))
    return int(states / max(1, run.rank_parameters) * run.parameters)


def check_disk(config: Config, size: int, folder: Path) -> str | None:
    """A warning where the checkpoints that are kept, of `size` bytes each, will not fit. Raises ConfigError where not even one does."""
    if not config.checkpoint.every and not config.checkpoint.at_end:
        return None
    free = free_bytes(_there(folder))
    if size > free:
        raise ConfigError(
            f"a checkpoint of {byte_size(size)} where {byte_size(free)} are free ({folder})",
            "a run saves its state: masters and optimizer states",
            "run_dir on another disk, or checkpoint.at_end=false with checkpoint.every=0",
        )
    kept = (config.checkpoint.keep or 1) + 1  # the newest is written before the oldest goes
    if config.checkpoint.every and kept * size > free:
        return (
            f"checkpoint.keep={config.checkpoint.keep} needs {byte_size(kept * size)} ({byte_size(size)} each, one more while it "
            f"is written) and {byte_size(free)} are free in {folder}"
        )
    return None


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
