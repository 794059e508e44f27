"""What the groups tell each other before an outer step, and what is made of it: who takes part, and does all agree.

Every rank tells the ranks of its own number in the other groups; all see the same rows and so come to one verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trainwright.errors import CheckpointError, ConfigError, ContradictionError

_VERSION = 1
SETTINGS = ("every", "fragments", "lr", "momentum", "dtype", "overlap", "delay", "correction", "mixing")
"""Of `outer`: what the groups must have in common, beside the number of groups."""


@dataclass(frozen=True)
class Header:
    """A rank's row. Numbers alone: nothing that comes over the network is unpickled."""

    group: int
    takes_part: bool
    """False: listens, for it comes back or waits for the others at the start."""
    fragment: int
    """-1 from one that listens, as are step and weights."""
    step: int
    """Inner steps done."""
    position: int
    """Of the group's cursor in the order of the data: everything before has gone into its weights."""
    weights: int
    """Checksum of the fragment's synchronised weights on this rank."""
    world_size: int
    layout: int
    """Checksum of the names and shapes of this rank's shards."""
    settings: int
    """Checksum of `SETTINGS`."""

    def as_tensor(self) -> Tensor:
        """int64 [1 + fields]."""
        values = [_VERSION, *(int(getattr(self, field.name)) for field in fields(self))]
        return torch.tensor(values, dtype=torch.int64)

    @classmethod
    def of(cls, row: Tensor) -> Header:
        """Back from the tensor. Raises ConfigError where the other side is of another version."""
        version, *values = row.tolist()
        if version != _VERSION:
            raise ConfigError(
                f"a group that speaks version {version} of the outer step, this one {_VERSION}",
                "all groups run one version of trainwright",
                "install the same version everywhere",
            )
        group, takes_part, *rest = values
        return cls(group, bool(takes_part), *rest)

    @staticmethod
    def length() -> int:
        """Numbers in a row."""
        return 1 + len(fields(Header))


def members(rows: Sequence[Header], own: Header) -> list[Header]:
    """The groups that take part, by number, after all was found to agree; empty where all listen.

    A group that listens and does not fit is no reason to stop for the others: it finds that out itself, and leaves.
    Raises ConfigError or ContradictionError (groups that cannot work together), CheckpointError (weights that differ).
    """
    taking_part = sorted((row for row in rows if row.takes_part), key=lambda row: row.group)
    compared = taking_part if own.takes_part else [*taking_part, own]
    if not taking_part:
        compared = sorted(rows, key=lambda row: row.group)
    numbers = [row.group for row in (rows if not own.takes_part else taking_part)]
    if numbers.count(own.group) > 1:
        raise ConfigError(
            f"two launches that are both outer.group={own.group}",
            "each group is launched once",
            "end one of them, or give it another outer.group",
        )
    for other in compared:
        _check_fits(compared[0], other)
    for other in taking_part[1:]:
        _check_together(taking_part[0], other)
    return taking_part


def _check_fits(first: Header, other: Header) -> None:
    who = f"groups {first.group} and {other.group}"
    if first.settings != other.settings:
        raise ContradictionError(
            f"{who} differ in `outer`",
            f"{', '.join(SETTINGS)} and groups are the same everywhere",
            "one config for all",
        )
    if first.world_size != other.world_size or first.layout != other.layout:
        raise ContradictionError(
            f"{who} hold the model in other shards ({first.world_size} and {other.world_size} ranks)",
            "rank i of a group averages its shards with rank i of the others",
            "the same model, number of ranks, zero.stage and parallel degrees in every group",
        )


def _check_together(first: Header, other: Header) -> None:
    who = f"groups {first.group} and {other.group}"
    if (first.fragment, first.step) != (other.fragment, other.step):
        raise ContradictionError(
            f"{who} send fragment {first.fragment} after step {first.step} and fragment {other.fragment} after step {other.step}",
            "groups that average have done equally many inner steps",
            "resume both from checkpoints of one step, or remove the checkpoints of one: it catches up from the other",
        )
    if first.weights != other.weights:
        raise CheckpointError(
            f"{who} hold other synchronised weights of fragment {first.fragment} at step {first.step}",
            "the groups of a run share one set of synchronised weights, to the last bit",
            "remove the checkpoints of one group: it catches up from the other",
        )
