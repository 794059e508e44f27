"""Where the records of a run go: `metrics.jsonl` always; TensorBoard and Weights & Biases when `track` asks."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError
from .metrics import EvaluationRecord, MetricsWriter, StepRecord


class Sink(Protocol):
    """Takes the records of a run, in order of their step."""

    def step(self, record: StepRecord) -> None:
        """One optimizer step."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """One evaluation."""

    def close(self) -> None:
        """Flushes; nothing comes after."""


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def step(self, record: StepRecord) -> None:
        """One optimizer step, to every sink."""
        for sink in self.sinks:
            sink.step(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """One evaluation, to every sink."""
        for sink in self.sinks:
            sink.evaluation(record)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self.sinks:
            sink.close()


class TensorBoardSink:
    """Scalars under train/ and heldout/ in `run_dir/tensorboard`."""

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        """resume_step: TensorBoard then hides what an earlier launch wrote beyond it."""
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(run_dir) / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def step(self, record: StepRecord) -> None:
        """One optimizer step."""
        for name, value in _scalars(record.as_dict()).items():
            self._writer.add_scalar(f"train/{name}", value, record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        """One evaluation."""
        for name, value in _scalars(record.as_dict()).items():
            self._writer.add_scalar(f"heldout/{name}", value, record.step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id lives in `run_dir/wandb-run-id`, so that a resume continues the same run."""

    def __init__(self, run_dir: str | Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        folder = Path(run_dir)
        identity = folder / "wandb-run-id"
        known = identity.read_text(encoding="utf-8").strip() if identity.is_file() else None
        self._run = wandb.init(dir=str(folder), name=name, config=dict(config), id=known, resume="allow")
        identity.write_text(str(self._run.id), encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """One optimizer step."""
        self._run.log({f"train/{k}": v for k, v in _scalars(record.as_dict()).items()}, step=record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        """One evaluation."""
        self._run.log({f"heldout/{k}": v for k, v in _scalars(record.as_dict()).items()}, step=record.step)

    def close(self) -> None:
        """Marks the run finished."""
        self._run.finish()


def check_installed(track: Sequence[str]) -> None:
    """Refuses, before any process starts, a sink whose package is not installed.

    Raises:
        ConfigError: an unknown sink, or a package that is missing.
    """
    packages = {"tensorboard": "tensorboard", "wandb": "wandb"}
    for name in track:
        if name not in packages:
            raise ConfigError(f"track: {name}", f"sinks are {', '.join(packages)}", "track: [tensorboard]")
        if importlib.util.find_spec(packages[name]) is None:
            raise ConfigError(
                f"track: [{name}], but the package {packages[name]} is not installed",
                "TensorBoard and Weights & Biases come with the extra `track`; metrics.jsonl is always written",
                "pip install 'trainwright[track]', or leave `track` out",
            )


def open_sinks(
    run_dir: str | Path,
    track: Sequence[str] = (),
    *,
    header: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int = 0,
) -> Sinks:
    """The sinks of a run, on rank 0. header: the first line of metrics.jsonl. config: shown by Weights & Biases.

    Raises:
        ConfigError: as `check_installed`.
    """
    check_installed(track)
    sinks: list[Sink] = [MetricsWriter(run_dir, header, resume_step)]
    if "tensorboard" in track:
        sinks.append(TensorBoardSink(run_dir, resume_step))
    if "wandb" in track:
        sinks.append(WandbSink(run_dir, Path(run_dir).name, config or {}))
    return Sinks(sinks)


def _scalars(fields: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, but for its step."""
    return {
        name: float(value)
        for name, value in fields.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
