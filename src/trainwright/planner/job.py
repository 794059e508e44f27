"""What is given to a search: the machines, the model, the batch, and what the config has settled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainwright.errors import ConfigError
from trainwright.planner.hardware import Device, device_from_file, device_named
from trainwright.planner.memory import GIB
from trainwright.planner.workload import Masters, ModelShape, Moments, Precision, Schedule

USABLE = 0.94
"""Share of a device's memory that a plan may fill."""


@dataclass(frozen=True)
class Cluster:
    """So many of one device."""

    device: Device
    ranks: int

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """ "8xH100-80GB", or "16x8xH100-80GB" for 16 nodes of 8, or a device's YAML file in its name's place. Raises ConfigError."""
        found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z./~].*)", text)
        if found is None or 0 in (int(found[1] or 1), int(found[2] or 1)):
            raise ConfigError(f"--hardware {text}", "a number, an x and a device", "--hardware 8xH100-80GB")
        own = found[3].endswith((".yaml", ".yml"))
        device = device_from_file(Path(found[3]).expanduser()) if own else device_named(found[3])
        if found[1] and found[2]:
            device = replace(device, per_node=int(found[2]))
        return cls(device, int(found[1] or 1) * int(found[2] or 1))


@dataclass(frozen=True)
class Job:
    """What is given: model, machines, batch. `fixed` holds what the config has settled, by the names of `Plan`."""

    shape: ModelShape
    cluster: Cluster
    sequence_length: int
    global_batch: int
    """Sequences an optimizer step."""
    precision: Precision = "bf16"
    compiled: bool = True
    parts_backwards: bool = True
    """Whether zero-bubble schedules may leave blocks uncompiled to part their backwards: not under compile=true."""
    fused_update: bool = False
    """The config has the optimizer in backward: one micro-batch a step, no pipeline."""
    offloads: bool = True
    """Whether the search may put states on the host: not Muon's, whose matrices are gathered where the ranks talk."""
    masters: Masters = "fp32"
    moments: Moments = "fp32"
    reduce_bytes: int = 4
    sequence_parallel: bool = True
    schedule: Schedule | None = None
    """The config's, where it says."""
    most_tensor: int = 1 << 30
    """1 for a model that has no plan for tensor parallelism."""
    notes: tuple[str, ...] = ()
    """What the config says and the planner does not count."""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limit_bytes(self) -> float:
        """What a plan may fill of one device."""
        return USABLE * GIB * self.cluster.device.memory_gib

    @property
    def host_limit_bytes(self) -> float:
        """What a rank may fill of its host's memory."""
        return USABLE * GIB * self.cluster.device.host_gib
