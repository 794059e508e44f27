"""`trainwright launch --slurm`: a batch script for a config."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli_common import Overrides, split
from trainwright.errors import ConfigError


def launch(
    arguments: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a script for sbatch.")] = False,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines.")] = 1,
    per_node: Annotated[int, typer.Option("--per-node", help="Ranks, and GPUs, of each machine.")] = 8,
    time: Annotated[str, typer.Option("--time", help="Of one job; a longer run queues itself again.")] = "24:00:00",
    activate: Annotated[
        str, typer.Option("--activate", help="A line of bash first, such as 'source /shared/venv/bin/activate'.")
    ] = "",
    sbatch: Annotated[
        str, typer.Option("--sbatch", help="More of sbatch's options: '--partition=gpu --account=mine'.")
    ] = "",
    srun: Annotated[str, typer.Option("--srun", help="More of srun's options: '--container-image=IMAGE'.")] = "",
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="How often the job is queued again after a failure.")
    ] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="The script's file; default: standard output.")] = None,
) -> int:
    """Writes a batch script that trains a config on a cluster, saves before its time is up and goes on by itself.

    [dim]Such as:[/dim]  trainwright launch run.yaml run_dir=/shared/runs/mine --slurm --nodes 4 --per-node 8
    --sbatch '--partition=gpu --account=mine' --activate 'source /shared/venv/bin/activate' --out mine.sbatch
    """
    if not slurm:
        raise ConfigError(
            "launch without --slurm",
            "scripts are written for Slurm; MPI, torchrun and Kubernetes need none (docs/clusters.md)",
            "trainwright launch run.yaml --slurm --nodes 2",
        )
    from trainwright.config import load_config
    from trainwright.launch.slurm import SlurmJob, sbatch_script
    from trainwright.mesh import resolve_degrees

    file, overrides = split(arguments)
    config = load_config(file, overrides).config
    if config.run_dir is None:
        raise ConfigError(
            "a job without run_dir",
            "a job that is queued again goes on in the same folder, which all machines share",
            "run_dir=/shared/runs/mine",
        )
    resolve_degrees(config.parallel, config.zero.stage, nodes * per_node)  # on the login node, not in the queue
    name = Path(config.run_dir).name
    job = SlurmJob(
        name=name,
        run_dir=config.run_dir,
        command=["trainwright", "train", *([str(Path(file).absolute())] if file else []), *overrides],
        nodes=nodes,
        tasks_per_node=per_node,
        gpus=config.parallel.backend != "gloo",
        time=time,
        sbatch=shlex.split(sbatch),
        srun=shlex.split(srun),
        activate=activate,
        max_restarts=max_restarts,
    )
    script = sbatch_script(job)
    if out is None:
        print(script, end="")
        return 0
    out.write_text(script)
    out.chmod(0o755)
    print(f"{out}: sbatch {out}", file=sys.stderr)
    return 0
