"""A group is killed: the others go on at once, it comes back and catches up without holding them up, no sample is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from groups import lighthouse, prepare_data
from trainwright.data_seen import seen
from trainwright.monitor.metrics import read_metrics
from trainwright.outer.diary import read_diary
from two_hosts import Host, available, two_hosts

HERE = Path(__file__).parent
BATCH, STEPS, EVERY = 8, 500, 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("text"))


class Groups:
    """Groups as launches of their own, 2 ranks each. hosts: each on one of these machines."""

    def __init__(
        self, data: Path, run_dir: Path, address: str, *settings: str, hosts: tuple[Host, Host] | None = None
    ) -> None:
        self.run_dir, self._address, self._hosts = run_dir, address, hosts
        self._settings = [
            "model.transformer={layers: 2, dim: 32, heads: 2, ffn_dim: 48}", f"data={{path: {data}, sequence_length: 16}}",
            f"batch.global_size={BATCH}", f"steps={STEPS}", "optimizer.lr=3e-3", "zero=2", "compile=false",
            f"outer={{groups: 2, every: {EVERY}, timeout: 10, start_wait: 60, dtype: int8}}",
            "checkpoint.every=25", "evaluate.final_batches=1", *settings,
        ]  # fmt: skip
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, group: int, step_ms: int = 40) -> None:
        command = [sys.executable, "-m", "grouped", str(group), self._address, "2", str(self.run_dir), str(step_ms)]
        environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
        command += self._settings
        if self._hosts is not None:
            host = self._hosts[group]
            command, environment = host.command(*command), environment | host.environment()
        with (self.run_dir / f"output-{group}.txt").open("ab") as output:
            self.processes[group] = subprocess.Popen(
                command, cwd=HERE, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def lines(self, group: int, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_diary(self.run_dir / f"group-{group}") if line["kind"] == kind]

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run_dir.glob("output-*.txt")))

    def wait_for(self, what: Callable[[], Any], limit_s: float = 90.0) -> None:
        until_s = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < until_s, self.output()
            time.sleep(0.05)

    def kill(self, group: int) -> None:
        """SIGKILL to every rank and the launcher, as when a host is gone."""
        process = psutil.Process(self.processes[group].pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        self.processes[group].wait()

    def end(self) -> None:
        for group, process in self.processes.items():
            if process.poll() is None:
                self.kill(group)


@pytest.fixture(params=["one host", "two hosts, 20 Mbit/s"])
def groups(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Iterator[Groups]:
    with contextlib.ExitStack() as stack:
        if request.param == "one host":
            found = Groups(data, tmp_path, stack.enter_context(lighthouse()))
        elif not available():
            pytest.skip("network namespaces need root and iproute2")
        else:
            hosts = stack.enter_context(two_hosts(rate="20mbit"))
            address = stack.enter_context(_lighthouse_on(hosts[0]))
            found = Groups(data, tmp_path, address, hosts=hosts)
        stack.callback(found.end)
        yield found


@contextlib.contextmanager
def _lighthouse_on(host: Host) -> Iterator[str]:
    address = f"{host.address}:29513"
    command = host.command(sys.executable, "-m", "trainwright.cli", "lighthouse", "--bind", address)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


def test_a_group_that_is_killed_is_gone_on_without_and_catches_up(groups: Groups) -> None:
    for group in (0, 1):
        groups.start(group)
    groups.wait_for(lambda: len(groups.lines(1, "step")) >= 4)
    groups.kill(1)
    before = len(groups.lines(0, "step"))
    killed_s = time.monotonic()
    # One may have landed on the way; two more are made without the dead group.
    groups.wait_for(lambda: len(groups.lines(0, "step")) >= before + 2, limit_s=30)
    print(f"two outer steps after {time.monotonic() - killed_s:.1f} s")
    assert list(groups.lines(0, "step")[-1]["cursors"]) == ["0"]
    groups.start(1)
    groups.wait_for(lambda: groups.lines(1, "catch_up"))
    for process in groups.processes.values():
        assert process.wait(timeout=120) == 0, groups.output()
    _check_ledger(groups)
    ends = [read_metrics(groups.run_dir / f"group-{group}").evaluations[-1] for group in (0, 1)]
    assert ends[0]["val_loss"] == ends[1]["val_loss"]  # one set of weights, to the last bit
    caught_up = groups.lines(1, "catch_up")[0]
    assert groups.lines(0, "catch_up") == []
    # Groups that wait for one another would have been held up by the start of the other: the steps took their time only.
    waited_s = max(
        line["waited_s"] for line in groups.lines(0, "step") if line["step"] > caught_up["after"] + 2 * EVERY
    )
    assert caught_up["step"] > caught_up["after"]
    print(f"the other waited {waited_s:.2f} s at most")


def _check_ledger(groups: Groups) -> None:
    """Everything before a group's cursor went into the shared weights once: its rows of each global batch, in order."""
    for group in (0, 1):
        cursors = [line["cursors"][str(group)] for line in groups.lines(0, "step") if str(group) in line["cursors"]]
        positions = [position for _, position in cursors]
        assert all(p % BATCH == 0 for p in positions)
        assert positions == sorted(positions)
        found = seen(groups.run_dir / f"group-{group}")
        assert found.problems == (), found.problems
        own = found.samples
        assert len(own) == positions[-1] // 2
        expected = _rows(groups, group, positions[-1])
        assert own.tolist() == expected


def _rows(groups: Groups, group: int, position: int) -> list[int]:
    """The group's samples up to a position, from the order itself."""
    from trainwright.config import load_config
    from trainwright.data.mix import open_dataset

    config = load_config(groups.run_dir / f"group-{group}" / "config.yaml").config
    order = open_dataset(config.data).split("train").order(16, config.seed, True)
    rows = order.samples(0, position).reshape(-1, 2, BATCH // 2)
    return rows[:, group].flatten().tolist()


def test_a_group_catches_up_from_one_that_has_resumed_and_the_end_stays_the_end(data: Path, tmp_path: Path) -> None:
    """Its checkpoint lies between an outer step that was averaged and its being applied: the other gets it as applied."""
    with lighthouse() as address:
        groups = Groups(data, tmp_path, address, "steps=160", "checkpoint={every: 21, keep: 2}")
        try:
            for group in (0, 1):
                groups.start(group)
            groups.wait_for(lambda: len(groups.lines(0, "step")) >= 8)
            for group in (0, 1):
                groups.kill(group)
            shutil.rmtree(tmp_path / "group-1" / "checkpoints")
            for group in (0, 1):
                groups.start(group)
            for process in groups.processes.values():
                assert process.wait(timeout=120) == 0, groups.output()
            assert len(groups.lines(1, "catch_up")) == 1
            ends = [read_metrics(tmp_path / f"group-{group}").evaluations[-1]["val_loss"] for group in (0, 1)]
            assert ends[0] == ends[1]
            for group in (0, 1):
                groups.start(group)
            for process in groups.processes.values():
                assert process.wait(timeout=120) == 0, groups.output()
            again = [read_metrics(tmp_path / f"group-{group}").evaluations[-1]["val_loss"] for group in (0, 1)]
            assert again == ends, "the same command after the end changes nothing"
        finally:
            groups.end()
