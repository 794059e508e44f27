"""One config on all ranks: settings that differ make ranks wait for each other, or train something nobody asked for."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from trainwright import distributed
from trainwright.config import Config
from trainwright.errors import ConfigError
from trainwright.ledger import here
from trainwright.position import of_ranks

_OF_A_RANK = (
    "run_dir",
    "data.cache",
    "offload.path",
    "track",
    "profile.steps",
    "profile.after",
    "guard.disagree",
    "guard.wait",
    "guard.first_wait",
)
"""What may differ: where a rank writes, what it tells, how long it waits."""


def check_same_config(config: Config) -> None:
    """Raises ConfigError, on all ranks, where they have not the same config. Collective."""
    if not distributed.several():
        return
    mine = _flat(config.model_dump(mode="json"))
    everyone: list[Any] = [None] * dist.get_world_size()
    here.collective(b"comparison of the configs")
    dist.all_gather_object(everyone, mine)
    for key in sorted(set().union(*everyone)):
        values: dict[str, list[int]] = {}
        for rank, config_of_rank in enumerate(everyone):
            values.setdefault(repr(config_of_rank.get(key)), []).append(rank)
        if len(values) > 1:
            told = ", ".join(f"{value} on {of_ranks(ranks)}" for value, ranks in values.items())
            raise ConfigError(f"{key} is {told}", "all ranks have one config", f"one value of {key} for all ranks")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        if name in _OF_A_RANK:
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found
