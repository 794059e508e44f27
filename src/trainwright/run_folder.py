"""Where a run is on disk. Imports no torch: the command line asks before ranks are started."""

from __future__ import annotations

from pathlib import Path

from trainwright.errors import CheckpointError

CONFIG_NAME = "config.yaml"


def group_folder(run_dir: str | None, group: int | None) -> str | None:
    """The folder of a group of ranks that trains by itself (`outer`): a run of its own inside the run's."""
    if run_dir is None or group is None or Path(run_dir).name == f"group-{group}":
        return run_dir
    return str(Path(run_dir) / f"group-{group}")


def find_run(path: str | Path) -> Path:
    """The run's folder that `path` is, or that the checkpoint folder `path` lies in.

    Raises CheckpointError where there is no run, naming those nearby.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():
        return path
    above = path.absolute().parent.parent  # of run/checkpoints/step-00000100
    if path.is_dir() and (above / CONFIG_NAME).is_file():
        return above
    found = sorted(p.parent.name for p in path.parent.glob(f"*/{CONFIG_NAME}"))[:8] if path.parent.is_dir() else []
    raise CheckpointError(
        f"{path} is no run: it holds no {CONFIG_NAME}",
        "a run is the folder that `trainwright train` wrote, or a checkpoint inside it",
        f"one of: {', '.join(found)}" if found else "the run_dir that `trainwright train` printed",
    )
