"""Runs a function on several Gloo ranks, each a process of its own (house rule 8).

`run_ranks(function, world_size, *args)` starts the ranks over a file rendezvous, one thread each, and returns
the ranks' results in order. The first failing rank's traceback is raised here; the others are reaped. Ranks are forked
from a server that has imported what all of them need (tests/forked.py): imports would take longer than most tests.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

multiprocessing.set_forkserver_preload(["forked"])


class RankFailure(AssertionError):
    """A rank raised: its traceback, first in time."""


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    rendezvous: str,
    results: Any,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    import torch.distributed as dist

    warnings.simplefilter("error")
    from trainwright import distributed
    from trainwright.torch_private import quiet_known_warnings

    quiet_known_warnings()
    torch.set_num_threads(1)
    os.environ.clear()  # the server's is that of its start
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    ok = False
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=300),
        )
        value = function(rank, *args)
        ok = True
        # Pickled here: torch's queues would share storage that dies with this process.
        results.put((rank, "ok", pickle.dumps(value), time.time()))
    except BaseException as error:
        results.put((rank, "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}", time.time()))
    finally:
        distributed.shutdown(orderly=ok)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 900.0) -> list[Any]:
    """Results of `function(rank, *args)` on each of `world_size` ranks. `function` must be importable (top level)."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        processes = [
            context.Process(
                target=_rank_main,
                args=(function, rank, world_size, rendezvous, results, args, dict(os.environ)),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(processes: list[Any], results: Any, timeout_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.time() + timeout_s
    while len(values) < len(processes):
        try:
            rank, status, value, _ = results.get(timeout=1.0)
        except queue.Empty:
            dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0) and i not in values]
            if dead:
                with contextlib.suppress(queue.Empty):  # a result may still be in the pipe
                    rank, status, value, _ = results.get(timeout=2.0)
                    if status == "error":
                        raise RankFailure(f"rank {rank} failed first:\n{value}") from None
                    values[rank] = pickle.loads(value)
                    continue
                raise RankFailure(f"rank {dead[0]} died, exit code {processes[dead[0]].exitcode}") from None
            if time.time() > deadline:
                raise RankFailure(f"ranks {sorted(set(range(len(processes))) - set(values))} did not finish") from None
            continue
        if status == "error":
            raise RankFailure(f"rank {rank} failed first:\n{value}")
        values[rank] = pickle.loads(value)
    return [values[rank] for rank in range(len(processes))]
