"""Elastic nodes under torchrun (--nnodes 1:2): a host dies, the other goes on from the last whole checkpoint; it comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from texts import words
from trainwright.data import PrepareSettings, prepare
from trainwright.data_seen import seen
from trainwright.monitor.metrics import read_metrics
from two_hosts import Host, available, two_hosts

pytestmark = pytest.mark.skipif(not available(), reason="network namespaces need root and iproute2")
_PATIENCE_S = 60
"""The promise: a loss or a return of a host is over by then."""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


def agent(hosts: tuple[Host, Host], index: int, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """torchrun's agent on a host; the first host keeps the meeting place. log: what it and its rank say."""
    host = hosts[index]
    # last_call_timeout: how long a meeting that has its least number of hosts waits for more. 30 s if nothing is said.
    meeting = [
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29513", "--rdzv-id", "elastic",
        "--rdzv-conf", f"is_host={int(index == 0)},last_call_timeout=3", "--local-addr", host.address,
    ]  # fmt: skip
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1:2",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "9",
    ]
    command = host.command(*run, *meeting, "-m", "trainwright.cli", "train", *arguments)
    # On the agents' store, which all rounds share by default, the ranks of a round would find the addresses of the last.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = os.environ | host.environment() | own_store | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def wait_for(what: Callable[[], bool], agents: list[subprocess.Popen[bytes]]) -> float:
    """Seconds until it holds."""
    start_s = time.monotonic()
    while not what():
        assert time.monotonic() - start_s < _PATIENCE_S, "it takes too long"
        assert all(process.poll() is None for process in agents), "an agent ended"
        time.sleep(0.2)
    return time.monotonic() - start_s


@pytest.mark.slow
def test_a_host_dies_and_comes_back(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text(words(index, 900))
    prepare(str(tmp_path / "*.txt"), tmp_path / "data", PrepareSettings(vocab_size=300, held_out=0.1))
    run = tmp_path / "run"
    settings = [
        "model.transformer={dim: 32, layers: 2, heads: 2}", f"data.path={tmp_path / 'data'}", "data.sequence_length=32",
        "batch.global_size=8", "steps=1000000", "zero=2", "compile=false", "checkpoint.every=50", f"run_dir={run}",
    ]  # fmt: skip

    def last() -> tuple[int, int]:
        """The last step, and on how many ranks it was taken."""
        metrics = read_metrics(run) if (run / "metrics.jsonl").exists() else None
        if metrics is None or not metrics.steps:
            return 0, 0
        step = int(metrics.steps[-1]["step"])
        return step, int(metrics.launch_of(step)["world_size"])

    logs = [tmp_path / f"host-{index}.log" for index in (0, 1)]
    agents = [agent(hosts, index, logs[index], *settings) for index in (0, 1)]
    try:
        wait_for(lambda: last() > (60, 0) and last()[1] == 2, agents)
        agents[1].send_signal(signal.SIGKILL)  # its rank dies with it
        agents[1].wait()
        lost_s = wait_for(lambda: last()[1] == 1, agents[:1])
        agents[1] = agent(hosts, 1, logs[1], *settings)
        back_s = wait_for(lambda: last()[1] == 2, agents)
        end = last()[0] + 60
        wait_for(lambda: last()[0] > end, agents)
    finally:
        for process in agents:
            process.send_signal(signal.SIGTERM)
        for process in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
    print(f"alone after {lost_s:.1f} s, together again after {back_s:.1f} s")
    metrics = read_metrics(run)
    steps = [int(record["step"]) for record in metrics.steps]
    assert steps == list(range(1, len(steps) + 1))
    worlds = [int(metrics.launch_of(step)["world_size"]) for step in steps]
    assert [world for place, world in enumerate(worlds) if place == 0 or worlds[place - 1] != world] == [2, 1, 2]
    assert seen(run).problems == ()
