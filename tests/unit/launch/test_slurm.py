"""`trainwright launch --slurm`: what the script says, bash's own check of it, and a job under stand-ins for Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from texts import words
from trainwright.cli import main
from trainwright.data import PrepareSettings, prepare
from trainwright.errors import ConfigError
from trainwright.launch.slurm import SlurmJob, sbatch_script
from trainwright.monitor.metrics import read_metrics

# srun's part in it: as many tasks as the job has, each told its number; signals handed on; a bad end ends all.
SRUN = """\
#!{python}
import os, signal, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
own = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "OMP_NUM_THREADS": "1"}}
tasks = [
    subprocess.Popen(words, env=os.environ | own | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}) for i in range(count)
]
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        time.sleep(2)
        [task.kill() for task in tasks if task.poll() is None]
    time.sleep(0.05)
sys.exit(max(task.returncode % 256 for task in tasks))
"""
SCONTROL = """\
#!/bin/bash
echo "$@" >> {log}
if [[ $1 == show ]]; then echo localhost; echo other; fi
"""
TRAINWRIGHT = '#!/bin/bash\nexec {python} -m trainwright.cli "$@"\n'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slurm")
    for index in range(4):
        (root / f"{index}.txt").write_text(words(index, 300))
    prepare(str(root / "*.txt"), root / "data", PrepareSettings(vocab_size=300, held_out=0.2))
    return root / "data"


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job's script, with the stand-ins first in its path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("trainwright", TRAINWRIGHT)):
        (programs / name).write_text(text.format(python=sys.executable, log=tmp_path / "scontrol.log"))
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    return {**os.environ, **job, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def asked(tmp_path: Path) -> list[str]:
    """What scontrol was asked to do."""
    log = tmp_path / "scontrol.log"
    return [line for line in log.read_text().splitlines() if not line.startswith("show")] if log.exists() else []


def script_of(tmp_path: Path, data: Path, *more: str, run: str = "run") -> Path:
    out = tmp_path / f"{run}.sbatch"
    settings = [
        "model.transformer={dim: 16, layers: 1, heads: 2}", f"data.path={data}", "data.sequence_length=16",
        "batch.global_size=4", "steps=300", f"run_dir={tmp_path / run}", "compile=false", "parallel.backend=gloo",
    ]  # fmt: skip
    words = ["--slurm", "--nodes", "1", "--per-node", "2", "--out", str(out)]
    assert main(["launch", *settings, *more, *words]) == 0
    return out


def test_the_script_passes_bashs_check_and_quotes_what_it_is_given(tmp_path: Path) -> None:
    job = SlurmJob(
        name="mine",
        run_dir="/shared/runs/my run",
        command=["trainwright", "train", "/shared/run.yaml", "model={preset: llama-10m}", "freeze=[$x, 'y']"],
        nodes=4,
        tasks_per_node=8,
        gpus=True,
        time="1-12:00:00",
        sbatch=["--partition=gpu", "--account=a"],
        srun=["--container-image=nvcr.io#x/y:1"],
        activate="source /shared/venv/bin/activate",
    )
    text = sbatch_script(job)
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1-12:00:00", "--partition=gpu", "--account=a",
                 "--signal=B:USR1@120", "--requeue"):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    # Slurm stops reading its options at the first command.
    assert text.rindex("#SBATCH") < text.index("set -uo pipefail")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    shown = text.replace("srun --kill-on-bad-exit=1", "printf '%s\\n'").replace("source /shared", ": /shared")
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=shown, text=True, capture_output=True, env=environment)
    assert done.stdout.splitlines() == ["--container-image=nvcr.io#x/y:1", *job.command]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "0"], "at least one node"),
        (["--time", "3h"], "days-hh:mm:ss"),
        (["--sbatch", "partition=gpu"], "behind a `=`"),
        (["parallel.tensor=3"], "divides the number of ranks"),
        (["run_dir=null"], "a job without run_dir"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["launch", "model.preset=llama-10m", "steps=5", "run_dir=/shared/x", "--slurm", "--per-node", "2"]
    given = [word for word in given if not (words[0].startswith("run_dir") and word.startswith("run_dir"))]
    assert main([*given, *words]) == 2
    assert told in capsys.readouterr().err


def test_without_slurm_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "run_dir=/x"]) == 2
    assert "--slurm" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        SlurmJob("a", "/x", ["x"], 1, 1, False, time="")


def test_a_job_is_stopped_in_time_queued_again_and_finishes(
    tmp_path: Path, data: Path, cluster: dict[str, str]
) -> None:
    script = script_of(tmp_path, data)
    process = subprocess.Popen(
        ["bash", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=cluster
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and '"step": 3' in metrics.read_text().replace('":', '": ').replace("  ", " ")
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert asked(tmp_path) == [f"requeue {cluster['SLURM_JOB_ID']}"], output
    at = read_metrics(tmp_path / "run").steps[-1]["step"]
    assert 3 <= at < 300
    again = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, env=cluster | {"SLURM_RESTART_COUNT": "1"}, timeout=240
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the run is finished" in again.stdout
    assert len(asked(tmp_path)) == 1
    steps = [record["step"] for record in read_metrics(tmp_path / "run").steps]
    assert steps == list(range(1, 301))
    assert read_metrics(tmp_path / "run").header["world_size"] == 2


def test_a_failure_is_tried_again_but_an_error_of_settings_is_not(
    tmp_path: Path, data: Path, cluster: dict[str, str]
) -> None:
    crashing = script_of(tmp_path, data, run="crash")
    text = crashing.read_text()
    for code, restarts, queued in ((137, "0", True), (1, "2", True), (1, "3", False), (2, "0", False)):
        (tmp_path / "scontrol.log").write_text("")
        crashing.write_text(text.replace("srun --kill-on-bad-exit=1", f"bash -c 'exit {code}'"))
        done = subprocess.run(
            ["bash", str(crashing)], capture_output=True, text=True, env=cluster | {"SLURM_RESTART_COUNT": restarts}
        )
        assert done.returncode == code
        assert bool(asked(tmp_path)) == queued, (code, restarts)
    wrong = script_of(tmp_path, data, run="wrong")
    wrong.write_text(wrong.read_text().replace(str(data), "/nowhere"))
    done = subprocess.run(["bash", str(wrong)], capture_output=True, text=True, env=cluster, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert asked(tmp_path) == []
