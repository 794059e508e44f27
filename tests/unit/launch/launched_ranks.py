"""What the launched ranks of test_launch.py run. Imported by the ranks, so it needs no pytest."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def _rank() -> int:
    return int(os.environ["RANK"])


def _join() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def _leave() -> None:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def report(argv: list[str]) -> None:
    """Says on both streams who it is and what it was given."""
    print(f"out of rank {_rank()} of {os.environ['WORLD_SIZE']}: {argv} threads={os.environ['OMP_NUM_THREADS']}")
    print(f"err of rank {_rank()}", file=sys.stderr)


def fail_on_one(argv: list[str]) -> None:
    """Rank 1 raises, rank 0 waits for it in a collective."""
    import torch
    import torch.distributed as dist

    _join()
    if _rank() == 1:
        raise RuntimeError("the embedding is on fire")
    dist.all_reduce(torch.ones(1))


def fail_on_purpose(argv: list[str]) -> None:
    """Every rank refuses the same config."""
    from trainwright.errors import ConfigError

    raise ConfigError("zero.stage: 7", "stages are 0, 1, 2 and 3", "zero.stage=2")


def train_until_stopped(argv: list[str]) -> int:
    """A loop that agrees on a stop over the ranks at every step, then saves."""
    import torch
    import torch.distributed as dist

    from trainwright.launch.signals import StopSignal

    folder = Path(argv[0])
    _join()
    with StopSignal() as stop:
        (folder / f"pid-{_rank()}").write_text(str(os.getpid()))
        flag = torch.zeros(1)
        while not flag.item():
            time.sleep(0.02)
            flag.fill_(float(stop.requested))
            dist.all_reduce(flag)
        time.sleep(0.3)  # the save
        (folder / f"saved-{_rank()}").write_text(stop.signal_name)
    _leave()
    return 0


def sleep_long(argv: list[str]) -> None:
    """Ranks that only wait."""
    (Path(argv[0]) / f"pid-{_rank()}").write_text(str(os.getpid()))
    time.sleep(60)


def sleep_through_stops(argv: list[str]) -> None:
    """Ranks that do not end when they are asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_long(argv)


def leave_pid(argv: list[str]) -> int:
    """Tells which process it ran in."""
    (Path(argv[0]) / "pid").write_text(str(os.getpid()))
    return 0
