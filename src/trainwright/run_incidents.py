"""What went wrong in a step of a run, kept so that it can be looked at: `run_dir/incidents/step-00000120-spike.json`.

Each names the samples of the step's global batch, their documents, and the checkpoint that the step can be replayed
from; the checkpoints of the newest incidents are not pruned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainwright import distributed, storage
from trainwright.data.loader import TokenLoader
from trainwright.data.shards import TokenDataset
from trainwright.monitor.metrics import StepRecord
from trainwright.run_checkpoints import RunCheckpoints

FOLDER = "incidents"
_KEPT = 3
"""Newest incidents whose checkpoints stay."""
_MOST_DOCUMENTS = 20


@dataclass
class RunIncidents:
    """Writes them, on rank 0."""

    run_dir: Path
    checkpoints: RunCheckpoints
    loader: TokenLoader
    dataset: TokenDataset

    def __post_init__(self) -> None:
        self.protect()

    def write(self, kind: str, record: StepRecord, text: str) -> str:
        """Keeps what is known of a step; what to tell the user. kind: spike, non-finite."""
        name = f"step-{record.step:08d}-{kind}.json"
        if distributed.is_main():
            size = self.loader.plan.global_size
            start = record.samples - self.loader.plan.stride + self.loader.plan.first_of_group
            samples = self.loader.samples_at(start, size)
            whole = [c for c in self.checkpoints.folder.list() if c.whole and c.manifest is not None]
            before = [c for c in whole if c.manifest is not None and c.manifest.step < record.step]
            documents = self._documents(samples)
            content: dict[str, Any] = {
                "kind": kind,
                "step": record.step,
                "text": text,
                "loss": _plain(record.loss),
                "grad_norm": _plain(record.grad_norm),
                "data_version": self.loader.split.version,
                "position": start,
                "samples": samples.tolist(),
                "documents": [self.dataset.document_name(n) for n in documents[:_MOST_DOCUMENTS]],
                "checkpoint": before[-1].name if before else None,
            }
            (self.run_dir / FOLDER).mkdir(exist_ok=True)
            storage.atomic_write_bytes(self.run_dir / FOLDER / name, json.dumps(content, indent=1).encode())
            self.protect()
        return f"step {record.step}: {text}; {FOLDER}/{name}; look at it: trainwright replay {self.run_dir} --step {record.step}"

    def _documents(self, samples: Any) -> list[int]:
        numbers = [self._read(int(sample))[2] for sample in samples[:256]]
        return [int(n) for n in np.unique(np.concatenate(numbers))]

    def _read(self, sample: int) -> Any:
        split, length = self.loader.split, self.loader.sequence_length
        return split.read(split.sequence_start(sample, length), length)

    def protect(self) -> None:
        """Has the checkpoints of the newest incidents stay."""
        names = [read(path).get("checkpoint") for path in incidents_of(self.run_dir)[-_KEPT:]]
        self.checkpoints.protect(frozenset(name for name in names if isinstance(name, str)))


def incidents_of(run_dir: Path) -> list[Path]:
    """A run's incidents, by step."""
    return sorted((run_dir / FOLDER).glob("step-*.json"))


def read(path: Path) -> dict[str, Any]:
    """One incident; empty where the file is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: float | None) -> float | str | None:
    """Strict JSON has no inf and nan."""
    return value if value is None or np.isfinite(value) else str(value)
