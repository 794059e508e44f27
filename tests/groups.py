"""Several groups of ranks at once, each a world of its own, and a lighthouse for them to meet at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ranks import run_ranks
from trainwright.launcher_variables import free_port
from trainwright.outer.lighthouse import start_lighthouse


@contextmanager
def lighthouse(heartbeat_timeout_s: float = 2.0) -> Iterator[str]:
    """Its address."""
    address = f"127.0.0.1:{free_port()}"
    server = start_lighthouse(address, min_groups=1, patience_s=60, heartbeat_timeout_s=heartbeat_timeout_s)
    try:
        yield address
    finally:
        server.shutdown()


def run_groups(function: Callable[..., Any], groups: int, ranks: int, *args: Any) -> list[list[Any]]:
    """`function(rank, group, lighthouse, *args)` on every rank of every group: results by group, then by rank."""
    with lighthouse() as address, ThreadPoolExecutor(groups) as pool:
        return list(pool.map(lambda group: run_ranks(function, ranks, group, address, *args), range(groups)))


def prepare_data(folder: Path) -> Path:
    """A small token data set of one-to-one words."""
    from trainwright.data import PrepareSettings, prepare

    for index in range(8):
        (folder / f"{index:02d}.txt").write_text(" ".join(f"word{(i * i * 7 + index * 13) % 97}" for i in range(700)))
    out = folder / "tokens"
    prepare([str(folder / "*.txt")], out, PrepareSettings(vocab_size=280, held_out=0.13), progress=False)
    return out


def settings(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run's config; `changes` by dotted key with `__` for the dot."""
    found: dict[str, Any] = {
        "model": {"transformer": {"dim": 32, "layers": 3, "heads": 2, "head_dim": 16, "ffn_dim": 48}},
        "data": {"path": str(data), "sequence_length": 16},
        "batch": {"global_size": 8},
        "steps": 8,
        "optimizer": {"name": "sgd", "lr": 0.3, "weight_decay": 0.0},
        "evaluate": {"final_batches": 1},
        "checkpoint": {"at_end": False, "asynchronous": False},
        "compile": False,
        "run_dir": str(run_dir),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            found[section] = {**found.get(section, {}), name: value}
        else:
            found[section] = value
    return found
