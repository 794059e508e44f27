"""`slow_link.py --only killed`: two groups on two hosts, and every process of the second host dies by SIGKILL halfway.

How long until the first host goes on, whether the second one catches up when it is started again, and whether each sample
was trained on once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from slow_link import Hosts, fresh, group_command, interface, lighthouse

from trainwright.config import load_config
from trainwright.data.mix import open_dataset
from trainwright.data_seen import seen
from trainwright.monitor.metrics import read_metrics
from trainwright.outer.diary import read_diary


def killed(hosts: Hosts, given: argparse.Namespace, every: int) -> int:
    """The second host's processes die halfway: how long the first one waits, what the second one does when it is back."""
    folder = fresh(given.out / "killed")
    places = [folder / f"group-{h}" for h in (0, 1)]

    def lines(host: int, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_diary(places[host]) if line["kind"] == kind]

    def start(host: int) -> subprocess.Popen[bytes]:
        command = group_command(hosts, given, every, folder, host, "checkpoint.resume=auto", "checkpoint.every=50")
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | interface(host))

    def wait_until(process: subprocess.Popen[bytes], what: Callable[[], bool]) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        while not what():
            if process.poll() is not None:
                sys.exit(f"a host's training ended early with {process.returncode}")
            time.sleep(0.05)
        return time.monotonic() - began

    with lighthouse():
        first, second = start(0), start(1)
        halfway = given.steps // every // 2
        wait_until(first, lambda: len(lines(0, "step")) >= halfway)
        _kill(second)
        made = len(lines(0, "step"))
        # One may have been on its way: the next one is made without the dead host.
        gone_on_s = wait_until(first, lambda: len(lines(0, "step")) >= made + 2)
        alone = list(lines(0, "step")[-1]["cursors"]) == ["0"]
        second = start(1)
        back_s = wait_until(second, lambda: bool(lines(1, "catch_up")))
        codes = [process.wait() for process in (first, second)]
    losses = [read_metrics(place).evaluations[-1]["val_loss"] for place in places]
    exact = [_ledger_is_exact(places[h], h) for h in (0, 1)]
    print(f"\nthe second host died after {made} outer steps; two more were made in {gone_on_s:.1f} s, alone: {alone}")
    print(f"started again, it caught up after {back_s:.1f} s: {lines(1, 'catch_up')[0]}")
    print(f"both ended with {codes}; held-out loss {losses[0]:.6f} and {losses[1]:.6f}")
    print(f"each host's samples are its rows of every global batch, once and in order: {exact}")
    good = codes == [0, 0] and alone and gone_on_s < 10 and losses[0] == losses[1] and all(exact)
    print("holds" if good else "DOES NOT HOLD")
    return 0 if good else 1


def _ledger_is_exact(place: Path, host: int) -> bool:
    """Whether a group was trained on its half of each global batch up to where it ended, each sample once, in order."""
    config, found = load_config(place / "config.yaml").config, seen(place)
    order = open_dataset(config.data).split("train").order(config.data.sequence_length, config.seed, True)
    batch = config.batch.global_size
    rows = order.samples(0, 2 * len(found.samples)).reshape(-1, 2, batch // 2)[:, host]
    return not found.problems and rows.flatten().tolist() == found.samples.tolist()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to it and all that it has started."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
