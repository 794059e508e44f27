"""What the launcher says of this process. Imports no torch: the command line asks before anything heavy is loaded.

Launchers are recognised by the variables they set: torchrun (RANK), Open MPI (OMPI_COMM_WORLD_*), MPICH and
Intel MPI (PMI_*), Slurm's srun (SLURM_*). Without a launcher the world is one process.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from trainwright.errors import LaunchError

PORTS = range(20000, 32000)
"""Where ranks meet unless told: below those that Linux gives to whoever asks for any (32768 to 60999)."""


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


# launcher: how its users give the address that it does not tell itself
_MEETING = {
    "openmpi": "mpirun -x MASTER_ADDR=<rank 0's machine> ... (Open MPI 5 and later do not tell it)",
    "mpi": "mpiexec -genv MASTER_ADDR <rank 0's machine> ...",
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
        local_world_size = _local_world_size(env, launcher, names[3], world_size)
        if not 0 <= rank < world_size:
            raise LaunchError(
                f"{names[0]}={rank}, {names[1]}={world_size}", "a rank is in [0, world size)", "launch with torchrun"
            )
        address, port = _rendezvous(env, launcher)
        if address is None and local_world_size < world_size:
            raise LaunchError(
                f"{world_size} ranks on several machines, and no MASTER_ADDR",
                "all ranks are told where they meet",
                _MEETING.get(launcher, "MASTER_ADDR=the first machine's name or address, and MASTER_PORT=29500"),
            )
        address = address or "127.0.0.1"
        return Launch(rank, world_size, local_rank, local_world_size, address, port, launcher)
    return Launch(0, 1, 0, 1, None, None, "none")


_PREFIXES = (
    "MASTER_",
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "SLURM_",
    "TRAINWRIGHT_LAUNCHER",
    "TRAINWRIGHT_LOG",
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that is no rank: what launchers set is left out."""
    told = {name for names in _VARIABLES.values() for name in names}
    return {k: v for k, v in environment.items() if k not in told and not k.startswith(_PREFIXES)}


def _local_world_size(env: Mapping[str, str], launcher: str, name: str, world_size: int) -> int:
    """Ranks on this machine. srun without --ntasks-per-node says how many each node has: "2(x3),1" for nodes 0 to 3."""
    if launcher == "slurm" and not env.get(name):
        text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
        counts = [
            int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))
        ]
        node = _number(env, "SLURM_NODEID", default=0)
        if node < len(counts):
            return counts[node]
    return _number(env, name, default=world_size)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "").split("(")[0]  # Slurm writes SLURM_NTASKS_PER_NODE as "4(x2)"
    if not text:
        if default is None:
            raise LaunchError(
                f"{name} is not set", "the launcher sets it for each process", "launch with torchrun or srun"
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={env[name]!r}", "a whole number is needed", "launch with torchrun or srun") from None


def _rendezvous(env: Mapping[str, str], launcher: str) -> tuple[str | None, int]:
    address = env.get("MASTER_ADDR")
    if address is None and launcher == "slurm":
        address = _first_slurm_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
    if address is None:
        # Open MPI 4 names its head node's addresses ("...;tcp://10.0.0.1,...:port"); 5 tells those of each rank's own node.
        uri = env.get("OMPI_MCA_orte_hnp_uri", "")
        address = (
            uri.split("tcp://")[1].split(",")[0].split(":")[0] if "tcp://" in uri and launcher == "openmpi" else None
        )
    job = env.get("SLURM_JOB_ID") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMIX_NAMESPACE") or "0"
    digits = int("".join(c for c in job if c.isdigit())[-6:] or "0")
    port = _number(env, "MASTER_PORT", default=PORTS.start + digits % len(PORTS))
    return address, port


def free_port() -> int:
    """One of `PORTS` that nobody listens on now, on the loopback. Raises LaunchError."""
    for port in random.SystemRandom().choices(PORTS, k=100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LaunchError(
        "100 ports tried, none is free", f"one between {PORTS.start} and {PORTS.stop} is", "see `ss -tln`"
    )


def _first_slurm_host(nodes: str) -> str | None:
    """First host of Slurm's compressed list: "node[03-07,9],x1" -> "node03"."""
    if not nodes:
        return None
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]
