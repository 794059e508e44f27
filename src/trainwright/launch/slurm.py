"""A batch script for Slurm that trains, saves before its time is up, and queues itself again until the run is finished.

The script is plain bash with nothing of Trainwright in it but the command: it can be read, changed and kept. What it
stands on: `sbatch --signal=B:USR1@S` sends USR1 to the script alone, S seconds before the end; `srun` hands signals
that it gets to its tasks; the ranks agree on a step, save and end (launch/signals.py).
https://slurm.schedmd.com/sbatch.html, https://slurm.schedmd.com/srun.html
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from trainwright.errors import ConfigError
from trainwright.launcher_variables import PORTS

__all__ = ["SlurmJob", "sbatch_script"]

_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})\Z")
SAVE_S = 120
"""Before the end of the job's time: a step, and the save of a checkpoint."""


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm."""

    name: str
    run_dir: str
    command: Sequence[str]
    """`trainwright train ...`: what a task runs."""
    nodes: int
    tasks_per_node: int
    gpus: bool
    """A GPU a task."""
    time: str = "24:00:00"
    """As sbatch takes it: minutes, hh:mm:ss, days-hh:mm:ss."""
    sbatch: Sequence[str] = ()
    """More of its options, such as --partition=gpu."""
    srun: Sequence[str] = ()
    """More of srun's, such as --container-image=IMAGE."""
    activate: str = ""
    """A line of bash before the ranks start, such as `source /shared/venv/bin/activate`."""
    max_restarts: int = 3
    """How often the job queues itself after a failure."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.tasks_per_node < 1:
            got = f"--nodes {self.nodes} --per-node {self.tasks_per_node}"
            raise ConfigError(got, "at least one node, and a rank on it", "--nodes 2 --per-node 8")
        if _TIME.match(self.time) is None:
            got = f"--time {self.time}"
            raise ConfigError(got, "Slurm's own words: minutes, hh:mm:ss or days-hh:mm:ss", "--time 24:00:00")
        for option, words in (("--sbatch", self.sbatch), ("--srun", self.srun)):
            wrong = [word for word in words if not re.match(r"-\S", word) or "\n" in word]
            if wrong:
                remedy = f'{option} "--partition=gpu --account=mine"'
                raise ConfigError(f"{option}: {wrong[0]!r}", "options with their values behind a `=`", remedy)


def sbatch_script(job: SlurmJob) -> str:
    """The script's text."""
    return "\n".join(["#!/bin/bash", *_directives(job), "", *_setting(job), "", _body(job)])


def _directives(job: SlurmJob) -> list[str]:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([f"--gpus-per-node={job.tasks_per_node}"] if job.gpus else []),
        f"--time={job.time}",
        f"--signal=B:USR1@{SAVE_S}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
        *job.sbatch,
    ]
    return [f"#SBATCH {option}" for option in options]


def _setting(job: SlurmJob) -> list[str]:
    return [
        "# Written by `trainwright launch --slurm`. Submit it with sbatch; docs/clusters.md says what it does.",
        "set -uo pipefail",
        *([job.activate] if job.activate else []),
        f"run_dir={shlex.quote(job.run_dir)}",
        f"max_restarts={job.max_restarts}",
        "",
        "# The ranks meet on the job's first node, at a port that is the job's own.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT=$(({PORTS.start} + SLURM_JOB_ID % {len(PORTS)}))",
        "export MASTER_ADDR MASTER_PORT",
    ]


def _body(job: SlurmJob) -> str:
    # --kill-on-bad-exit: without a rank the others wait in vain, and Slurm would let them.
    start = shlex.join(["srun", "--kill-on-bad-exit=1", *job.srun, *job.command])
    return f"""\
{start} &
ranks=$!

# USR1: the time is nearly up. TERM: the job was cancelled. srun hands either to the ranks, which save and end.
ending=no
trap 'ending=time; kill -USR1 "$ranks"' USR1
trap 'ending=cancelled; kill -TERM "$ranks"' TERM
code=129
while (( code > 128 )); do # a trapped signal ends `wait`, not the ranks
  wait "$ranks"
  code=$?
  kill -0 "$ranks" 2>/dev/null || break
done

if (( code == 0 )) && grep -q '"status": "finished"' "$run_dir/summary.json" 2>/dev/null; then
  echo "the run is finished: $run_dir"
elif [[ $ending == time ]] && (( code == 0 )); then
  echo "saved; the job is queued again and goes on from there"
  scontrol requeue "$SLURM_JOB_ID"
elif [[ $ending != cancelled ]] && (( code > 0 && code != 2 && ${{SLURM_RESTART_COUNT:-0}} < max_restarts )); then
  # 2 is an error of settings: it would be the same again
  echo "failed with code $code; the job is queued again, from the last whole checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
