"""The ranks of a job find one another: torch's rendezvous, with words for those who wait.

torch says nothing while a rank waits for the others, for half an hour and, where another program answers at the port,
without end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from trainwright.error_file import record_failure
from trainwright.errors import LaunchError
from trainwright.launcher_variables import PORTS, Launch
from trainwright.scheduling import behind_computation

_TELLS_AFTER_S = (30, 120, 600)
_GRACE_S = 60
"""Beyond the time that torch is given, for its own error."""


def meet(launch: Launch, backend: str, device: torch.device, timeout: timedelta) -> None:
    """Starts the default process group of several ranks. Whoever waits long says for whom, on stderr.

    Raises LaunchError where the ranks do not meet within `timeout`. A process that torch does not wake up then ends with
    that error.
    """
    os.environ.setdefault("MASTER_ADDR", launch.master_address or "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(launch.master_port))
    try:
        with _telling(launch, timeout), behind_computation(backend == "gloo"):  # NCCL's threads feed a GPU
            dist.init_process_group(
                backend,
                init_method="env://",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _not_met(launch, str(error)) from error


@contextlib.contextmanager
def _telling(launch: Launch, timeout: timedelta) -> Iterator[None]:
    """Tells of a meeting that takes long; ends the process where torch would wait on."""
    met = threading.Event()

    def tell() -> None:
        waited, end = 0.0, timeout.total_seconds() + _GRACE_S
        for seconds in (s for s in _TELLS_AFTER_S if s < end):
            if met.wait(seconds - waited):
                return
            print(_waits(launch, seconds), file=sys.stderr, flush=True)
            waited = seconds
        if not met.wait(end - waited):
            error = _not_met(launch, f"no answer in {end:.0f} s")
            record_failure(error, stack="")
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    thread = threading.Thread(target=tell, name="trainwright-rendezvous", daemon=True)
    thread.start()
    try:
        yield
    finally:
        met.set()


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _waits(launch: Launch, seconds: float) -> str:
    others = "the other rank" if launch.world_size == 2 else f"the other {launch.world_size - 1} ranks"
    who = f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()} has waited {seconds:.0f} s for {others} at {_place()}"
    if launch.rank == 0:
        return f"{who}: are they started, and do they reach this address?"
    return f"{who}: does rank 0 run, is the port open between the machines, and does no other program listen there?"


def _not_met(launch: Launch, why: str) -> LaunchError:
    """The ranks did not find one another."""
    if launch.rank == 0 and "EADDRINUSE" in why:
        return LaunchError(
            f"rank 0 cannot listen on {_place()}: the port is in use",
            "the ranks meet at a port that is free on rank 0's machine",
            f"MASTER_PORT=another one, from {PORTS.start} to {PORTS.stop - 1} (Linux gives those above 32768 to whoever asks for any)",
        )
    return LaunchError(
        f"rank {launch.rank} of {launch.world_size} did not meet the others at {_place()}: {why.splitlines()[0]}",
        "rank 0 listens there, and every rank reaches it",
        "MASTER_ADDR=the address of rank 0's machine as the others see it, MASTER_PORT=a port that is open between them; where machines "
        "have several networks, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME=the one between them",
    )
