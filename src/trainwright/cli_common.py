"""What several commands share: arguments, and how ranks are started. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trainwright.errors import ConfigError, LaunchError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key.path=value ...]", help="A config file, and values that go before its own."
    ),
]
Nproc = Annotated[
    int | None, typer.Option("--nproc", help="Ranks on this machine; default: one a GPU, or one process.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def split(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """(config file or None, overrides) of a command's arguments."""
    files = [a for a in arguments or () if "=" not in a]
    if len(files) > 1:
        raise ConfigError(
            f"{' and '.join(files)} on the command line",
            "one config file, then key.path=value pairs",
            f"{files[0]} alone; values as key=value, such as zero.stage=2",
        )
    return (files[0] if files else None), [a for a in arguments or () if "=" in a]


def run_on_ranks(command: list[str], nproc: int | None, log_dir: Path, max_restarts: int = 0) -> int | None:
    """Starts the ranks and returns the exit code; None where this process is a rank itself."""
    from trainwright.launcher_variables import read_launch

    launch = read_launch()
    if launch.launcher != "none":
        if nproc is not None and nproc != launch.local_world_size:
            raise LaunchError(
                f"--nproc {nproc} inside {launch.launcher}'s {launch.local_world_size} rank(s)",
                "the launcher starts the ranks",
                "leave --nproc out, or start without the launcher's variables (RANK, SLURM_STEP_ID, ...)",
            )
        return None
    from trainwright.launch.run import default_nproc, launch_local

    if max_restarts:
        return launch_local(command, nproc, log_dir, max_restarts=max_restarts)
    ranks = nproc if nproc is not None else default_nproc()
    return None if ranks == 1 else launch_local(command, ranks, log_dir)
