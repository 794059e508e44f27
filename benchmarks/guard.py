"""What the ledger and the watchdog cost: steps with them and without, taking turns on the same engine.

`python benchmarks/guard.py [--ranks 2] [--rounds 30] [--steps 6] [--json FILE]`. Off means: no hooks on the blocks, notes that
write nothing, no watchdog. Prints the median ratio of neighbouring blocks of steps, and what one note takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WRITERS = (
    "_note",
    "_text",
    "module",
    "collective",
    "micro_batch",
    "step_done",
    "set_phase",
    "_begin_call",
    "_end_call",
)


def _nothing(*_: Any) -> None:
    pass


class Switch:
    """Turns notes, hooks and the watchdog off and on."""

    def __init__(self, engine: Any) -> None:
        from trainwright.ledger import Ledger
        from trainwright.parallel import notes

        self._class, self._written = Ledger, {name: getattr(Ledger, name) for name in WRITERS}
        self._hooks = []
        for _, unit in engine.parts.model.units:
            for table in (unit._forward_pre_hooks, unit._forward_hooks):
                ours = [
                    (k, h)
                    for k, h in table.items()
                    if getattr(h, "func", None) in (notes._forward_begins, notes._forward_ends)
                ]
                assert ours, "a block has its hooks"
                self._hooks += [(table, key, hook) for key, hook in ours]

    def off(self) -> None:
        for name in WRITERS:
            setattr(self._class, name, _nothing)
        for table, key, _ in self._hooks:
            del table[key]

    def on(self) -> None:
        for name, method in self._written.items():
            setattr(self._class, name, method)
        for table, key, hook in self._hooks:
            table[key] = hook
            table.move_to_end(key, last=False)


def _rank(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    import trainwright as tw
    from trainwright import distributed
    from trainwright.guard import watch
    from trainwright.guard.limits import Limits
    from trainwright.ledger import here
    from trainwright.models.transformer import Transformer, TransformerSettings

    torch.set_num_threads(1)
    settings = TransformerSettings(vocab_size=2048, dim=128, layers=6, heads=4, kv_heads=4, head_dim=32, ffn_dim=352)
    engine = tw.initialize(model=lambda: Transformer(settings), config={"zero": 2})
    switch = Switch(engine)
    tokens = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}

    def block() -> float:
        start = time.perf_counter()
        for _ in range(arguments.steps):
            engine.train_batch(batch)
        return (time.perf_counter() - start) / arguments.steps

    block()
    on, off = [], []
    for round_number in range(arguments.rounds):
        for variant in (True, False) if round_number % 2 else (False, True):
            if not variant:
                switch.off()
                watch._stop()
            (on if variant else off).append(block())
            if not variant:
                switch.on()
                watch.watch_ranks(Limits())
    before = here.position().notes
    engine.train_batch(batch)
    notes = here.position().notes - before
    start = time.perf_counter()
    for _ in range(100_000):
        here.module(b"blocks.3")
    note_us = (time.perf_counter() - start) * 10
    ratio = statistics.median(a / b for a, b in zip(on, off, strict=True))
    engine.close()
    distributed.shutdown()
    return {"step_ms": statistics.median(off) * 1e3, "ratio": ratio, "note_us": note_us, "notes_a_step": notes}


def main() -> None:
    """Runs the ranks and prints rank 0's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        found = _rank(arguments)
        if os.environ["RANK"] == "0":
            if arguments.json:
                arguments.json.write_text(json.dumps(found))
            print(
                f"a step of {found['step_ms']:.1f} ms takes {found['ratio']:.4f} of its time without ledger and watchdog; "
                f"{found['notes_a_step']} notes of {found['note_us']:.2f} us each"
            )
        return
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:]],
            env=os.environ
            | {
                "RANK": str(r),
                "WORLD_SIZE": str(arguments.ranks),
                "LOCAL_RANK": str(r),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for r in range(arguments.ranks)
    ]
    sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
