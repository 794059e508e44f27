"""What a ledger says: where a rank is, and the layout of the file that it says it in.

Layout, little endian, `BYTES` long: a head (who), the place (where), a ring of the names of the last `RING` collectives.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from trainwright.processes import ProcessId

MAGIC = b"twledger2"
HEAD = struct.Struct("<16sqqqqq56s")  # magic, rank, world size, pid, its namespace, its start, host
MOVE = struct.Struct("<qd")  # number of notes, time of the last one (CLOCK_MONOTONIC: one clock for a machine)
STEP = struct.Struct("<qqq")  # step under way (the first is 1), micro-batch (from 1; 0: none), micro-batches
COUNT = struct.Struct("<q")  # collectives so far
TIMES = struct.Struct("<qdq")  # steps done in this process, seconds of the slowest but the first, peak memory
AT_MOVE, AT_STEP, AT_CALL, AT_PHASE, AT_MODULE, AT_COUNT, AT_TIMES, AT_SAME, AT_RING = (
    128,
    160,
    192,
    240,
    272,
    400,
    416,
    480,
    512,
)
SAME = struct.Struct("<?")  # whether this rank's collectives are its own
CALL, PHASE, MODULE, NAME = 32, 32, 128, 64  # bytes of a call's name, a phase's, a module's, a collective's
RING = 64
"""How many collectives back a ledger tells."""
BYTES = AT_RING + RING * NAME


@dataclass(frozen=True)
class Position:
    """What a ledger says. `call` is empty outside the engine's calls; `since` is on this machine's monotonic clock."""

    rank: int
    world_size: int
    process: ProcessId
    host: str
    notes: int
    since: float
    step: int
    micro_batch: int
    micro_batches: int
    call: str
    phase: str
    module: str
    collectives: int
    last_collectives: tuple[str, ...]
    """Oldest first, at most RING."""
    steps_done: int = 0
    slowest_step_s: float = 0.0
    peak_bytes: int = 0
    """Most memory of the host that the process had had when its last step was done."""

    own_collectives: bool = False
    """It holds other parts of the model than other ranks, and calls other collectives."""

    def describe(self) -> str:
        """Such as "step 7 in forward of blocks.3, micro-batch 2 of 4", or "save() after step 6"."""
        after = f"after step {self.step - 1}" if self.step > 1 else "before the first step"
        if not self.call and self.phase != "backward":
            return f"{'reading data' if self.phase == 'data' else 'outside the engine'}, {after}"
        if self.call and self.call not in STEP_CALLS:
            return f"{self.call}() {after}"
        what = self.phase or {"step": "step()", "": "backward"}.get(self.call, self.call)
        module = f" of {self.module}" if self.module else ""
        count = f", micro-batch {self.micro_batch} of {self.micro_batches}" if self.micro_batches > 1 else ""
        return f"step {self.step} in {what}{module}{count}"

    @property
    def last_collective(self) -> str:
        return self.last_collectives[-1] if self.last_collectives else ""


STEP_CALLS = ("forward", "backward", "step", "train_batch")
"""Calls that belong to the step under way; the others stand between two steps."""


def _string(content: bytes, at: int, size: int) -> str:
    return content[at : at + size].split(b"\0", 1)[0].decode(errors="replace")


def decode(content: bytes) -> Position | None:
    if len(content) != BYTES:
        return None
    magic, rank, world_size, pid, namespace, start, host = HEAD.unpack_from(content, 0)
    if magic.rstrip(b"\0") != MAGIC:
        return None
    notes, since = MOVE.unpack_from(content, AT_MOVE)
    step, micro_batch, micro_batches = STEP.unpack_from(content, AT_STEP)
    (collectives,) = COUNT.unpack_from(content, AT_COUNT)
    steps_done, slowest_s, peak_bytes = TIMES.unpack_from(content, AT_TIMES)
    first = max(0, collectives - RING)
    ring = tuple(_string(content, AT_RING + i % RING * NAME, NAME) for i in range(first, collectives))
    return Position(
        rank,
        world_size,
        ProcessId(pid, namespace, start),
        host.split(b"\0", 1)[0].decode(errors="replace"),
        notes,
        since,
        step,
        micro_batch,
        micro_batches,
        _string(content, AT_CALL, CALL),
        _string(content, AT_PHASE, PHASE),
        _string(content, AT_MODULE, MODULE),
        collectives,
        ring,
        steps_done,
        slowest_s,
        peak_bytes,
        SAME.unpack_from(content, AT_SAME)[0],
    )


def of_ranks(ranks: list[int]) -> str:
    """[1, 2, 3, 5] as "ranks 1-3, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
