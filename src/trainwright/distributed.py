"""Where this process stands among the others: launcher's variables, device, backend, start, agreement, the end.

Every entry point (Python calls, command line, tests) starts and ends its process group through this file.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainwright import ledger, ledger_folder
from trainwright.errors import LaunchError
from trainwright.launcher_variables import Launch, read_launch
from trainwright.ledger import here
from trainwright.rendezvous import meet
from trainwright.scheduling import behind_computation, put_behind_computation
from trainwright.torch_private import quiet_known_warnings

TIMEOUT = timedelta(minutes=30)


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process in the running job."""

    launch: Launch
    device: torch.device
    backend: str

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()


_started_here = False


def start(backend: str = "auto") -> World:
    """Starts the default process group (or takes the one that runs) and picks this rank's device.

    Raises LaunchError where the backend is not in this build of torch or has no device.
    """
    global _started_here
    launch = read_launch()
    device = _device(launch, backend)
    chosen = _backend(backend, device)
    if not dist.is_initialized():
        quiet_known_warnings()
        if launch.world_size == 1:
            dist.init_process_group(chosen, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)  # type: ignore[attr-defined]
        else:
            meet(launch, chosen, device, TIMEOUT)
        _started_here = True
        # A process that ends without an orderly shutdown aborts now and then (FSDP2's threads); a user's script must not.
        atexit.register(_shutdown_at_exit)
        _notice_lone_processes(launch)
    else:
        put_behind_computation("gloo_tcp")  # its loop
    if here.path is None:
        _open_ledger()
    return World(launch, device, dist.get_backend())


def _open_ledger() -> None:
    """A job of several ranks keeps this rank's place in a file: of use when it is stuck or dead."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if not several():
        return
    named = os.environ.get(ledger.VARIABLE)
    # The ranks of a machine have one parent, under every launcher.
    name = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'job')}-{os.environ.get('MASTER_PORT', '0')}-{os.getppid()}"
    folder = Path(named) if named else ledger_folder.folder_of(re.sub(r"[^\w.-]", "_", name))
    try:
        if not named:
            ledger_folder.sweep(folder.parent)
            ledger_folder.forget_dead(folder)
        here.open(folder / f"rank-{rank}.ledger", rank, size, host())
        atexit.register(_close_ledger)

    except OSError as error:  # a machine without room in memory can train all the same
        warnings.warn(f"{folder}: {error}; a rank that dies will not have told where it was", stacklevel=3)


def _device(launch: Launch, backend: str) -> torch.device:
    if backend == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if _has_its_own(launch, count) else launch.local_rank
    if index >= count:
        raise LaunchError(
            f"local rank {launch.local_rank} on a machine with {count} GPU(s)",
            "one rank a GPU",
            f"start {count} ranks here (--nproc {count}), or set parallel.backend=gloo for the CPU",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _has_its_own(launch: Launch, visible: int) -> bool:
    """Whether the launcher shows this process one GPU alone, its own (`srun --gpus-per-task=1`): that is number 0."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return launch.launcher == "slurm" and visible == 1 and "SLURM_GPUS_PER_TASK" in os.environ and "," not in named


def check_backend(wanted: str) -> None:
    """Raises LaunchError where this machine has not the collectives' library that is asked for."""
    _backend(wanted, torch.device("cuda" if wanted != "gloo" and torch.cuda.is_available() else "cpu"))


def _backend(wanted: str, device: torch.device) -> str:
    if wanted == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        why = "no CUDA GPU is visible" if dist.is_nccl_available() else "this build of torch has no NCCL"
        raise LaunchError(f"parallel.backend=nccl, but {why}", "NCCL needs CUDA GPUs", "parallel.backend=gloo or auto")
    if wanted in ("auto", "nccl") and device.type == "cuda":
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _notice_lone_processes(launch: Launch) -> None:
    """Several single processes that were meant to be one job: MPI started them, yet each sees a world of one."""
    if launch.launcher == "none" and int(os.environ.get("MPI_LOCALNRANKS", "1") or 1) > 1:
        warnings.warn(
            "this process runs alone although MPI started several on this host: launch with torchrun, or set RANK and WORLD_SIZE",
            stacklevel=3,
        )


def _close_ledger() -> None:
    if getattr(sys, "last_value", None) is None:  # what an error leaves behind may be looked at
        here.close()


def _shutdown_at_exit() -> None:
    shutdown(orderly=getattr(sys, "last_value", None) is None)  # after an error nobody comes to the meeting


def shutdown(orderly: bool = True) -> None:
    """The orderly end: drops cyclic garbage (FSDP2 keeps models alive), meets the other ranks, destroys the group.

    `orderly=False` after a failure: does not wait for ranks that may never come.
    """
    global _started_here
    if not dist.is_initialized():
        return
    _kept.clear()
    gc.collect()
    if orderly:
        here.begin_call("shutdown")
        with contextlib.suppress(RuntimeError):  # another rank is gone already; its own message says why
            # Ranks that end by different paths must not wait for ever: a minute is longer than any honest difference.
            dist.monitored_barrier(timeout=timedelta(seconds=60)) if dist.get_backend() == "gloo" else dist.barrier()
    while _at_shutdown:
        _at_shutdown.pop()()
    dist.destroy_process_group()
    here.close(keep=not orderly)
    _started_here = False


_at_shutdown: list[Callable[[], None]] = []


def at_shutdown(callback: Callable[[], None]) -> None:
    """Calls it in `shutdown`, when the ranks have met and before the process group goes."""
    _at_shutdown.append(callback)


_kept: dict[Any, tuple[Any, Any]] = {}


def kept(key: Any, make: Callable[[], T]) -> T:
    """`make()` once for the job's process group, whoever asks: groups of some ranks cost threads and sockets, and
    engines one after another (a sweep, teacher and student) ask for the same ones. Collective where `make` is."""
    world, value = _kept.get(key, (None, None))
    if world is not dist.group.WORLD:
        with behind_computation(dist.get_backend() == "gloo"):
            value = make()
        _kept[key] = (dist.group.WORLD, value)
    return value


def several() -> bool:
    """Whether there are other ranks, real ones: a dry run plays one rank of many by itself."""
    return dist.get_world_size() > 1 and "fake" not in dist.get_backend()


def is_main() -> bool:
    """Whether this is rank 0 (or no group runs)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree_max(value: float, device: torch.device, group: Any = None) -> float:
    """The largest `value` over the ranks. Collective."""
    return agree_max_of([value], device, group)[0]


def agree_max_of(values: Sequence[float], device: torch.device, group: Any = None) -> list[float]:
    """Of each of `values` the largest over the ranks. Collective."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    if dist.get_world_size(group) > 1:
        here.collective(b"agreement")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return [float(value) for value in tensor.tolist()]


def from_main(value: Any) -> Any:
    """Rank 0's `value` (plain Python data) on every rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    here.collective(b"broadcast from rank 0")
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def host() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
