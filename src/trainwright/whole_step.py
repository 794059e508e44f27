"""A replica's batch through all its forwards and backwards: what lies before the update in `train_batch`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainwright.data.batch import Batch
from trainwright.guard.numerics import Replay
from trainwright.micro_batches import cut, label_count, numbered_rows
from trainwright.normaliser import StepNormaliser, StepSums
from trainwright.parallel.parallel_model import LossSum
from trainwright.parts import Parts


def whole_step(
    parts: Parts, normaliser: StepNormaliser, batch: Batch | dict[str, Any], step: int
) -> tuple[StepSums, Replay]:
    """(sums of the step, how to look for what is not finite in it); gradients lie in the parameters. Collective.

    step: its number, 0 the first. Raises UsageError where the rows do not allow the micro-batches.
    """
    micro_batches = cut(batch, parts.accumulation, parts.mesh.device)
    nominal = normaliser.agree_on_nominal(label_count(micro_batches[0])) * len(micro_batches)
    run = functools.partial(_run, parts, nominal)
    scale = parts.update.scaler.scale / nominal
    if parts.captured is not None:
        run = functools.partial(parts.captured.run, run)
    total = run(micro_batches, scale, step)
    model = parts.model
    replay = Replay(
        model.module,
        lambda: [model.loss(m) for m in micro_batches],
        lambda: numbered_rows(micro_batches),
        model.loss,
    )
    return StepSums(total.count, total.masked, total.sum, nominal, counted=True), replay


def _run(
    parts: Parts, nominal: float, micro_batches: Sequence[Any], scale: float | Tensor, step: int | Tensor
) -> LossSum:
    """scale, step: tensors where they are captured."""
    return parts.model.run(
        micro_batches,
        scale,
        lambda index: parts.randomness(step, index, micro_batches[index]),
        lambda count: parts.update.begin(count, nominal, of_slice=True),
    )
