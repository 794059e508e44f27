"""Bytes that this machine sends to others, as its network interfaces count them.

What the interfaces count is what the links carry: every collective between machines whatever its algorithm, and
whatever else the machine sends (checkpoints on their way to a store). Ethernet: /proc/net/dev (proc(5)), without the
loopback. InfiniBand, past which the kernel's network does not look: `port_xmit_data`, in units of four bytes
(https://docs.kernel.org/infiniband/sysfs.html has the layout).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist

from trainwright import distributed

__all__ = ["SentBytes", "sent_bytes"]

_INFINIBAND_UNIT_BYTES = 4


def sent_bytes(proc: Path = Path("/proc/net/dev"), infiniband: Path = Path("/sys/class/infiniband")) -> int | None:
    """Bytes sent since the machine (or its container's network) started; None where the system does not tell."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    total = 0
    for line in lines:
        name, colon, counts = line.partition(":")
        if colon and name.strip() != "lo":
            total += int(counts.split()[8])
    for port in infiniband.glob("*/ports/*/counters/port_xmit_data"):
        with contextlib.suppress(OSError, ValueError):
            total += int(port.read_text()) * _INFINIBAND_UNIT_BYTES
    return total


class SentBytes:
    """Of each step: what this machine sent since the step before. None in jobs of one machine. Creation is collective."""

    def __init__(self) -> None:
        self._before: int | None = None
        self._counts = False
        if dist.is_initialized() and distributed.several():
            hosts: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(hosts, distributed.host())
            self._counts = len(set(hosts)) > 1

    def step(self) -> int | None:
        """Bytes since the last call; None at the first."""
        if not self._counts:
            return None
        before, self._before = self._before, sent_bytes()
        return self._before - before if self._before is not None and before is not None else None
