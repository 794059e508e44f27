"""Named points of a run, for what goes beside the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from trainwright.monitor.metrics import EvaluationRecord, StepRecord
    from trainwright.train import TrainingLoop


class Callback:
    """Points of a run that a caller may act at; every rank calls them, in step. Override what is needed."""

    name = ""
    """Under which its state lies in a checkpoint; one without a name keeps none."""

    def on_resume(self, loop: TrainingLoop, path: Path, state: dict[str, Any]) -> None:
        """A checkpoint was loaded. state: what `state` gave when it was saved; empty where it gave nothing."""

    def on_start(self, loop: TrainingLoop) -> None:
        """The engine is built (and resumed); no step of this launch is done."""

    def on_step_end(self, loop: TrainingLoop, record: StepRecord) -> None:
        """A step is done."""

    def on_evaluation(self, loop: TrainingLoop, record: EvaluationRecord) -> None:
        """An evaluation is done."""

    def on_checkpoint(self, loop: TrainingLoop, path: Path) -> None:
        """A checkpoint's content is taken; with asynchronous saving it is whole on disk a little later."""

    def on_last_step(self, loop: TrainingLoop) -> None:
        """The run's last step is done; the last evaluation and checkpoint come after this."""

    def state(self) -> dict[str, Any]:
        """What it keeps in a checkpoint, JSON."""
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """The same of tensors, by names that begin with its own."""
        return {}

    def on_end(self, loop: TrainingLoop, status: str) -> None:
        """The last step is done ("finished"), or a stop was asked for ("stopped")."""
