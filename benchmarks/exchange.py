"""Gloo's collectives against direct exchanges (exchange.py), between the ranks of this machine, taking turns.

    python benchmarks/exchange.py [--ranks 2 4] [--rounds 5]

Printed: milliseconds, the medians of the rounds, and the ratio of Gloo's time to ours.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 25)


def on_a_rank(argv: list[str]) -> int:
    import torch
    import torch.distributed as dist

    from trainwright import distributed, exchange

    warnings.simplefilter("ignore", FutureWarning)
    rounds = int(argv[0])
    distributed.start("gloo")
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    for size in SIZES:
        whole = torch.zeros(size // 4 // ranks * ranks)
        part, out = whole.chunk(ranks)[rank], torch.zeros(whole.numel() // ranks)
        ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "all-gather": (
                functools.partial(dist.all_gather_into_tensor, whole, part),
                functools.partial(exchange.all_gather, whole, part, group),
            ),
            "reduce-scatter": (
                functools.partial(dist.reduce_scatter_tensor, out, whole),
                functools.partial(exchange.reduce_scatter, out, whole, group, dist.ReduceOp.SUM),
            ),
            "all-reduce": (
                functools.partial(dist.all_reduce, whole),
                functools.partial(exchange.all_reduce, whole, group),
            ),
        }
        for name, pair in ways.items():
            times = [statistics.median(column) for column in zip(*(map(_ms, pair) for _ in range(rounds)), strict=True)]
            if rank == 0:
                told = f"Gloo {times[0]:8.3f} ms  ours {times[1]:8.3f} ms  {times[0] / times[1]:5.2f}x"
                print(f"{ranks} ranks  {size:>12,} bytes  {name:15} {told}")
    distributed.shutdown()
    return 0


def _ms(act: Callable[[], Any]) -> float:
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    for _ in range(10):
        act()
    return (time.perf_counter() - began) * 100


def main() -> None:
    from trainwright.launch.run import launch_local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, here)
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as logs:
            launch_local([str(given.rounds)], ranks, logs, entry="exchange:on_a_rank")


if __name__ == "__main__":
    main()
