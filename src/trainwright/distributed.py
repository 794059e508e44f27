"""Where this process stands among the others: launcher's variables, device, backend, start, agreement, the end.

Every entry point (Python calls, command line, tests) starts and ends its process group through this file.
Launchers are recognised by the variables they set: torchrun (RANK), Open MPI (OMPI_COMM_WORLD_*), MPICH and
Intel MPI (PMI_*), Slurm (SLURM_*). Without a launcher the world is one process.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainwright.errors import LaunchError
from trainwright.torch_private import quiet_known_warnings

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str | None
    master_port: int | None
    launcher: str
    """torchrun, openmpi, mpi, slurm or none."""


# launcher: variables of (rank, world size, local rank, local world size)
_VARIABLES: dict[str, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """The launcher's variables of `environment` (default: the process's), without starting anything.

    Raises LaunchError where a launcher's variables are incomplete or contradict each other.
    """
    env = os.environ if environment is None else environment
    for launcher, names in _VARIABLES.items():
        if names[0] not in env or names[1] not in env:
            continue
        # An interactive Slurm allocation (salloc, a batch script's own shell) sets these for a step of one task too;
        # a task of `srun` also has SLURM_STEP_ID.
        if launcher == "slurm" and "SLURM_STEP_ID" not in env:
            continue
        rank, world_size = _number(env, names[0]), _number(env, names[1])
        local_rank = _number(env, names[2], default=0 if world_size == 1 else None)
        local_world_size = _number(env, names[3], default=world_size)
        if not 0 <= rank < world_size:
            raise LaunchError(f"{names[0]}={rank}, {names[1]}={world_size}", "a rank is in [0, world size)", "launch with torchrun")
        address, port = _rendezvous(env, launcher)
        return Launch(rank, world_size, local_rank, local_world_size, address, port, launcher)
    return Launch(0, 1, 0, 1, None, None, "none")


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "").split("(")[0]  # Slurm writes SLURM_NTASKS_PER_NODE as "4(x2)"
    if not text:
        if default is None:
            raise LaunchError(f"{name} is not set", "the launcher sets it for each process", "launch with torchrun or srun")
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={env[name]!r}", "a whole number is needed", "launch with torchrun or srun") from None


def _rendezvous(env: Mapping[str, str], launcher: str) -> tuple[str, int]:
    address = env.get("MASTER_ADDR")
    if address is None and launcher == "slurm":
        address = _first_slurm_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
    if address is None:
        # Open MPI names its head node's addresses in its universe URI ("...;tcp://10.0.0.1,...:port").
        uri = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PMIX_SERVER_URI41") or ""
        address = uri.split("tcp://")[1].split(",")[0].split(":")[0] if "tcp://" in uri and launcher == "openmpi" else None
    job = env.get("SLURM_JOB_ID") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMIX_NAMESPACE") or "0"
    digits = int("".join(c for c in job if c.isdigit())[-6:] or "0")
    port = _number(env, "MASTER_PORT", default=20000 + digits % 20000)
    return address or "127.0.0.1", port


def _first_slurm_host(nodes: str) -> str | None:
    """First host of Slurm's compressed list: "node[03-07,9],x1" -> "node03"."""
    if not nodes:
        return None
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


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
            dist.init_process_group(chosen, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        else:
            os.environ.setdefault("MASTER_ADDR", launch.master_address or "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(launch.master_port))
            device_id = device if device.type == "cuda" else None
            dist.init_process_group(
                chosen,
                init_method="env://",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=TIMEOUT,
                device_id=device_id,
            )
        _started_here = True
        # A process that ends without an orderly shutdown aborts now and then (FSDP2's threads); a user's script must not.
        atexit.register(shutdown)
        _notice_lone_processes(launch)
    return World(launch, device, dist.get_backend())


def _device(launch: Launch, backend: str) -> torch.device:
    if backend == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise LaunchError(
            f"local rank {launch.local_rank} on a machine with {count} GPU(s)",
            "one rank a GPU",
            f"start {count} ranks here (--nproc {count}), or set parallel.backend=gloo for the CPU",
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


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


def shutdown(orderly: bool = True) -> None:
    """The orderly end: drops cyclic garbage (FSDP2 keeps models alive), meets the other ranks, destroys the group.

    `orderly=False` after a failure: does not wait for ranks that may never come.
    """
    global _started_here
    if not dist.is_initialized():
        return
    gc.collect()
    if orderly:
        try:
            # Ranks that end by different paths must not wait for ever: a minute is longer than any honest difference.
            dist.monitored_barrier(timeout=timedelta(seconds=60)) if dist.get_backend() == "gloo" else dist.barrier()
        except RuntimeError:  # another rank is gone already; its own message says why
            pass
    dist.destroy_process_group()
    _started_here = False


def is_main() -> bool:
    """Whether this is rank 0 (or no group runs)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree_max(value: float, device: torch.device, group: Any = None) -> float:
    """The largest `value` over the ranks. Collective."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return float(tensor.item())


def from_main(value: Any) -> Any:
    """Rank 0's `value` (plain Python data) on every rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def host() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
