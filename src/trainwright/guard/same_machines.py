"""The machines of a job before it trains: one set of versions, one data set, clocks that agree."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from trainwright import distributed
from trainwright.errors import DataVersionError, LaunchError
from trainwright.ledger import here
from trainwright.position import of_ranks

__all__ = ["CLOCKS_MAY_DIFFER_S", "check_same_data", "check_same_software", "clock_problem"]

CLOCKS_MAY_DIFFER_S = 5.0
"""The newest checkpoint is told by its time, and logs are read side by side."""


def check_same_software() -> str | None:
    """Raises LaunchError, on all ranks, where Python's, torch's or Trainwright's version differ between ranks: what
    they compute would, or the processes would not understand each other. What is to be said of the clocks. Collective."""
    if not distributed.several():
        return None
    mine = {
        "Trainwright": metadata.version("trainwright"),
        "torch": str(torch.__version__),
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
    here.collective(b"comparison of the versions")
    dist.barrier()  # so that all look at their clocks at about the same moment
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (distributed.host(), time.time(), mine))
    for what in mine:
        told = _told([(host, versions[what]) for host, _, versions in everyone])
        if told is not None:
            raise LaunchError(
                f"{what} is {told}",
                "all machines of a job run the same versions",
                f"install {what} {everyone[0][2][what]} on all of them, best from one image or environment",
            )
    return clock_problem([(host, seconds) for host, seconds, _ in everyone])


def clock_problem(clocks: list[tuple[str, float]]) -> str | None:
    """What to say of clocks, (machine, seconds) of each rank at one moment; None where they agree."""
    first, last = min(clocks, key=lambda clock: clock[1]), max(clocks, key=lambda clock: clock[1])
    apart_s = last[1] - first[1]
    if apart_s <= CLOCKS_MAY_DIFFER_S:
        return None
    return (
        f"the clock of {last[0]} is {apart_s:.0f} s ahead of {first[0]}'s: a resume may take an older checkpoint for the "
        "newest; set the clocks (NTP, chrony)"
    )


def check_same_data(version: str) -> None:
    """Raises DataVersionError, on all ranks, where the ranks have data sets of different versions. Collective."""
    if not distributed.several():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    here.collective(b"comparison of the data sets")
    dist.all_gather_object(everyone, (distributed.host(), version[:12]))
    told = _told(everyone)
    if told is not None:
        raise DataVersionError(
            f"the data set's version is {told}",
            "all ranks train on one data set",
            "copy the data set of one machine to the others, or give its URL: data.path=s3://bucket/plays",
        )


def _told(values: list[tuple[str, str]]) -> str | None:
    """(machine, value) of each rank in words; None where the values are equal."""
    by_value: dict[str, list[int]] = {}
    for rank, (_, value) in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    if len(by_value) == 1:
        return None
    return ", ".join(
        f"{value} on {'/'.join(sorted({values[rank][0] for rank in ranks}))} ({of_ranks(ranks)})"
        for value, ranks in by_value.items()
    )
