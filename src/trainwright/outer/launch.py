"""All groups of a run on this machine: a lighthouse, and each group a `trainwright train` of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.config.outer_schema import OuterConfig
from trainwright.launch.run import threads_per_rank
from trainwright.launch.signals import die_with_parent
from trainwright.launcher_variables import free_port
from trainwright.outer.lighthouse import start_lighthouse
from trainwright.run_folder import group_folder

_LOOK_S = 0.2


def launch_groups(command: Sequence[str], settings: OuterConfig, run_dir: str, nproc: int | None) -> int:
    """Starts every group and waits for all: 0 where all ended well, else the first other code.

    command: as after `trainwright`, such as ["train", "run.yaml"]. Group 0 writes to this console, group N to
    run_dir/group-N/logs/console.log. Ctrl-C and SIGTERM are handed on. A group that fails leaves the others running.
    """
    address = settings.lighthouse or f"127.0.0.1:{free_port()}"
    processes = [_start(command, settings, address, run_dir, group, nproc) for group in range(settings.groups)]
    # After the groups, so that they are forked from a process without threads.
    lighthouse: Any = None
    try:
        if settings.lighthouse is None:
            lighthouse = start_lighthouse(
                address,
                min_groups=settings.min_groups,
                patience_s=settings.patience,
                heartbeat_timeout_s=settings.heartbeat_timeout,
            )
        return _wait(processes, run_dir)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        if lighthouse is not None:
            lighthouse.shutdown()


def _start(
    command: Sequence[str], settings: OuterConfig, lighthouse: str, run_dir: str, group: int, nproc: int | None
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank((nproc or 1) * settings.groups)))
    arguments = [*command, f"outer.group={group}", f"outer.lighthouse={lighthouse}"]
    arguments += ["--nproc", str(nproc)] if nproc is not None else []
    output = None
    if group:
        logs = Path(str(group_folder(run_dir, group))) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        output = (logs / "console.log").open("ab")
    parent = os.getpid()
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "trainwright.cli", *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            preexec_fn=lambda: die_with_parent(parent),
            start_new_session=True,  # a Ctrl-C reaches them once, handed on
        )
    finally:
        if output is not None:
            output.close()


def _wait(processes: Sequence[subprocess.Popen[bytes]], run_dir: str) -> int:
    def hand_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    told: set[int] = set()
    try:
        while any(process.poll() is None for process in processes):
            for group, process in enumerate(processes):
                if process.poll() not in (None, 0) and group not in told:
                    told.add(group)
                    where = (
                        "above" if group == 0 else str(Path(str(group_folder(run_dir, group))) / "logs" / "console.log")
                    )
                    print(f"group {group} ended with code {process.returncode} ({where})", file=sys.stderr, flush=True)
            time.sleep(_LOOK_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return next((process.returncode for process in processes if process.returncode), 0)
