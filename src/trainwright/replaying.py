"""`trainwright replay RUN --step N`: a step of a run once more, on as many ranks as then, from the checkpoint before it.

Training is a pure function of checkpoint and data order, so the step's loss and gradient norm come out as metrics.jsonl
has them, to the last bit on one machine. Nothing is written to the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainwright import distributed
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.config import Resolved, load_config
from trainwright.data.batch import Batch
from trainwright.data.shards import TokenDataset
from trainwright.engine import Engine
from trainwright.errors import CheckpointError, DataError, DataVersionError, UsageError
from trainwright.mesh import resolve_degrees
from trainwright.micro_batches import cut, numbered_rows
from trainwright.monitor.metrics import read_metrics
from trainwright.run_folder import CONFIG_NAME, find_run
from trainwright.run_model import RunModel
from trainwright.snapshot import restore
from trainwright.train import open_data
from trainwright.training_run import loader_for, plan_for

_TEXT = 60


@dataclass(frozen=True)
class ReplayedSample:
    """A sequence of the replayed step on one rank."""

    rank: int
    sample: int
    loss: float
    """Mean over its own tokens, before the step."""
    document: str
    text: str
    """Its beginning."""


@dataclass(frozen=True)
class Replayed:
    """A step, replayed."""

    step: int
    checkpoint: str | None
    loss: float
    recorded_loss: float
    grad_norm: float
    recorded_grad_norm: float | None
    samples: tuple[ReplayedSample, ...]
    """Worst first."""

    @property
    def same(self) -> bool:
        """Whether it came out as recorded, to the last bit; a loss that is no number equals another."""
        return _same(self.loss, self.recorded_loss) and _same(self.grad_norm, self.recorded_grad_norm)


def _same(a: float, b: float | None) -> bool:
    return b is None or a == b or (a != a and b != b)


def point_before(run: str | Path, step: int) -> tuple[Path | None, int]:
    """The newest whole checkpoint before `step` (None: the run's beginning), and the number of ranks of then."""
    folder = find_run(run)
    recorded = {int(line["step"]): line for line in read_metrics(folder).steps}
    if step not in recorded:
        last = max(recorded, default=0)
        raise DataError(f"step {step} of {folder}", f"metrics.jsonl has steps 1 to {last}", f"--step {max(1, last)}")
    found = [c for c in CheckpointFolder(folder / "checkpoints").list() if c.whole and c.manifest is not None]
    before = [c for c in found if c.manifest is not None and c.manifest.step < step]
    newest = max(before, key=lambda c: c.manifest.step if c.manifest is not None else -1, default=None)
    return newest.path if newest is not None else None, int(read_metrics(folder).launch_of(step)["world_size"])


def replay(run: str | Path, step: int, say: Callable[[str], None] = lambda _: None) -> Replayed:
    """Collective: as many ranks as `point_before` says, for the same bits. Raises CheckpointError, DataError."""
    folder = find_run(run)
    resolved = load_config(folder / CONFIG_NAME)
    if resolved.config.outer.groups > 1:
        raise UsageError(
            f"{folder} is a group of {resolved.config.outer.groups}",
            "a step is replayed from the checkpoint before it, and outer steps in between need the other groups",
            f"trainwright data seen {folder} --steps {step} tells the step's samples",
        )
    distributed.start(resolved.config.parallel.backend)
    checkpoint, _ = point_before(folder, step)
    metrics = read_metrics(folder)
    recorded = next(line for line in metrics.steps if int(line["step"]) == step)
    engine, loader, dataset = _open(resolved, folder, checkpoint, metrics.launch_of(step))
    if engine.global_step >= step:
        raise CheckpointError(
            f"{checkpoint} is of step {engine.global_step}", f"a checkpoint before step {step}", "another step"
        )
    while engine.global_step < step - 1:
        engine.train_batch(next(loader))
        say(f"step {engine.global_step} of {step}")
    batch = next(loader)
    losses = _losses(engine, batch)
    loss = engine.train_batch(batch)
    assert engine.last_step is not None, "a step is done"
    samples = _from_all_ranks(_samples(batch, losses, dataset))
    norm = engine.last_step.grad_norm
    loader.close()
    engine.close()
    return Replayed(
        step,
        checkpoint.name if checkpoint else None,
        loss,
        float(recorded["loss"]),
        norm,
        recorded["grad_norm"],
        tuple(samples),
    )


def _samples(batch: Batch, losses: list[float], dataset: TokenDataset) -> list[ReplayedSample]:
    """This rank's."""
    assert batch.document_ids is not None, "the loader numbers documents"
    tokenizer = dataset.load_tokenizer()
    rows = zip(batch.sample_ids.tolist(), losses, batch.input_ids, batch.document_ids[:, 0].tolist(), strict=True)
    return [
        ReplayedSample(
            dist.get_rank(),
            sample,
            loss,
            dataset.document_name(document),
            " ".join(tokenizer.decode(tokens[:_TEXT].tolist()).split())[:_TEXT],
        )
        for sample, loss, tokens, document in rows
        if sample >= 0
    ]


def _from_all_ranks(mine: list[ReplayedSample]) -> list[ReplayedSample]:
    """All ranks', those whose loss is no number first, then the highest. Collective."""
    everyone: list[Any] = [mine]
    if dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return sorted((s for part in everyone for s in part), key=lambda s: (not math.isnan(s.loss), -s.loss))


def _open(resolved: Resolved, folder: Path, checkpoint: Path | None, launch: dict[str, Any]) -> Any:
    """Engine, loader and data set as they were at the checkpoint, for the launch that made the step."""
    order = {key: launch[name] for key, name in (("seed", "seed"), ("data__shuffle", "shuffle")) if name in launch}
    resolved = resolved.replace("the launch", data__sequence_length=int(launch["sequence_length"]), **order)
    config = resolved.config
    dataset, _ = open_data(config.data)
    if dataset.version != launch["data_version"]:
        raise DataVersionError(
            f"{dataset.path} has version {dataset.version[:12]}, {folder} was trained on {str(launch['data_version'])[:12]}",
            "a replay reads the data that the step was trained on",
            "bring back the data set of that version",
        )
    degrees = resolve_degrees(config.parallel, config.zero.stage, dist.get_world_size())
    plan = plan_for(config, degrees.replicate * degrees.shard, int(launch["global_size"]))
    model = RunModel(resolved, dataset.vocab_size, plan.accumulation, resumed=checkpoint is not None)
    engine = model.build(launch["steps"])
    loader = loader_for(config, dataset, plan, engine)
    if checkpoint is not None:
        loader.load_state_dict(restore(engine, checkpoint)["data"], allow_change=True)
    return engine, loader, dataset


@torch.no_grad()
def _losses(engine: Engine, batch: Batch) -> list[float]:
    """Mean loss of each row, by itself; every rank runs as many rows."""
    found = []
    for _, row in numbered_rows(cut(batch, 1, engine.device)):
        part = engine.parts.model.loss(row)
        found.append(float(part.sum) / max(1.0, float(part.count)))
    engine.parts.model.end_step()
    return found


def describe(found: Replayed, rank: int | None, most: int = 16) -> list[str]:
    """Lines for people. rank: only this one's samples."""
    shown = [s for s in found.samples if rank is None or s.rank == rank]
    start = f"checkpoint {found.checkpoint}" if found.checkpoint else "the run's beginning"
    lines = [
        f"step {found.step}, replayed from {start}: loss {found.loss:.9g} (recorded {found.recorded_loss:.9g}), gradient norm "
        f"{found.grad_norm:.9g} (recorded {found.recorded_grad_norm:.9g})"
        if found.recorded_grad_norm is not None
        else f"step {found.step}, replayed from {start}: loss {found.loss:.9g} (recorded {found.recorded_loss:.9g})",
        "the same to the last bit"
        if found.same
        else "NOT the same as recorded: other software, hardware or number of threads",
        f"its samples{'' if rank is None else f' on rank {rank}'}, the highest loss first:",
    ]
    lines += [
        f"  rank {s.rank}  sample {s.sample:>8}  loss {s.loss:8.4f}  document {s.document}: {s.text!r}"
        for s in shown[:most]
    ]
    if len(shown) > most:
        lines.append(f"  and {len(shown) - most} more (--json has all)")
    return lines
