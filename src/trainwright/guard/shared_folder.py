"""Which ranks see one and the same folder: those of one machine always do, those of several only on shared storage."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainwright import distributed
from trainwright.errors import ConfigError
from trainwright.ledger import here
from trainwright.position import of_ranks

__all__ = ["Sites", "describe", "sites_of"]

PATIENCE_S = 5.0
"""Network file systems may show another machine's new file late."""


@dataclass(frozen=True)
class Sites:
    """Ranks grouped by the folder that they see: `of_rank[r]` is the first rank that shares rank r's."""

    of_rank: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether all ranks see one folder."""
        return len(set(self.of_rank)) == 1

    def members(self, rank: int) -> list[int]:
        """The ranks that share a rank's folder, in order; the first of them acts for all."""
        return [other for other, site in enumerate(self.of_rank) if site == self.of_rank[rank]]

    @classmethod
    def alone(cls, world_size: int = 1) -> Sites:
        """All ranks on one folder."""
        return cls((0,) * world_size)


def sites_of(folder: Path) -> Sites:
    """Finds out by files: the first rank of each machine leaves one in `folder` (made if it is not there), and every
    rank looks for the others'. Collective. Raises ConfigError, on all ranks, where a machine cannot write to it."""
    if not distributed.several():
        return Sites.alone()
    rank, size = dist.get_rank(), dist.get_world_size()
    token = distributed.from_main(secrets.token_hex(6))
    mine: Path | None = None
    problem: str | None = None
    if rank == _first_of_host(rank):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = folder / f".{token}-{rank}.seen"
            mine.touch()
        except OSError as error:
            problem = f"{distributed.host()}: {error}"
    here.collective(b"which ranks share a folder")
    dist.barrier()
    first = _first_seen(folder, token)
    found: list[Any] = [None] * size
    dist.all_gather_object(found, (first, problem))
    if mine is not None:
        with contextlib.suppress(OSError):
            mine.unlink()
    problems = [problem for _, problem in found if problem is not None]
    if problems:
        raise ConfigError(
            f"run_dir={folder}: {problems[0]}", "every machine can write to the run's folder", "run_dir=runs/my-run"
        )
    return Sites(tuple(site if site is not None else other for other, (site, _) in enumerate(found)))


def _first_of_host(rank: int) -> int:
    """The lowest rank on this rank's machine. Collective."""
    hosts: list[str | None] = [None] * dist.get_world_size()
    # Containers of one image may share a name: the parent process tells them, and two launches on one machine, apart.
    dist.all_gather_object(hosts, f"{distributed.host()}/{os.getppid()}")
    return hosts.index(hosts[rank])


def _first_seen(folder: Path, token: str) -> int | None:
    """The lowest rank whose file is here; None if there is none."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError):
            names = [name for name in os.listdir(folder) if name.startswith(f".{token}-") and name.endswith(".seen")]
            ranks = sorted(int(name.removesuffix(".seen").rsplit("-", 1)[1]) for name in names)
            if ranks and (ranks[0] == 0 or time.monotonic() > until_s):
                return ranks[0]
        if time.monotonic() > until_s:
            return None
        time.sleep(0.1)


def describe(sites: Sites, hosts: list[str]) -> str:
    """Which ranks, of which machines, see one folder and which another. hosts: of each rank."""
    parts = []
    for site in sorted(set(sites.of_rank)):
        ranks = sites.members(site)
        parts.append(f"{of_ranks(ranks)} ({'/'.join(sorted({hosts[rank] for rank in ranks}))})")
    return " and another of ".join(parts[:3]) + (" and so on" if len(parts) > 3 else "")
