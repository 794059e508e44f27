"""The record of a step, and `metrics.jsonl`, the file that the report and every later look at a run are made from.

One JSON object a line: first a header (`kind: header`), at each resume what holds from there on (`kind: launch`),
and `kind: step` and `kind: evaluation` lines. The JSON is
strict: non-finite numbers are the strings `"nan"`, `"inf"` and `"-inf"`, which `read_metrics` turns back. A file
holds each step once: resuming at step s drops the lines beyond s before anything is appended.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
FORMAT_VERSION = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did. Counts are over all ranks.

    step: optimizer steps done, this one included. tokens, samples: seen since the start of training (cumulative).
    loss: mean over all valid tokens of the global batch, nats. grad_norm: global L2 norm before clipping.
    skipped: steps skipped for non-finite gradients since the start (cumulative). step_time_s: seconds.
    tokens_per_s: of this step, all ranks together. mfu: share of the peak, 0..1 (see `flops.py`), None if unknown.
    peak_memory_bytes: see `flops.peak_memory_bytes`. masked_micro_batches: of this step, with no valid token.
    data_time_s: seconds this rank waited for the step's batch, before step_time_s.
    node_sent_bytes: what rank 0's machine sent to others in this step (`network.py`); only in jobs of several machines.
    val_loss (nats a token), val_bits_per_byte: set when an evaluation followed this step.
    """

    step: int
    tokens: int
    samples: int
    loss: float
    lr: float
    grad_norm: float | None
    loss_scale: float
    skipped: int
    step_time_s: float
    tokens_per_s: float
    mfu: float | None = None
    peak_memory_bytes: int = 0
    masked_micro_batches: int = 0
    data_time_s: float = 0.0
    node_sent_bytes: int | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name; those of evaluations and of several machines only where they are set."""
        fields = dataclasses.asdict(self)
        for name in ("val_loss", "val_bits_per_byte", "node_sent_bytes"):
            if fields[name] is None:
                del fields[name]
        return fields


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation on held-out data, after `step`.

    val_loss: mean over all valid held-out tokens, nats a token. val_bits_per_byte: the same in bits a byte of text,
    None where the bytes are not known. tokens: evaluated. time_s: seconds it took. best: the lowest val_loss so far.
    """

    step: int
    val_loss: float
    val_bits_per_byte: float | None = None
    tokens: int = 0
    time_s: float = 0.0
    best: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Metrics:
    """A metrics file as read: the header, the steps and the evaluations, each in order of their step."""

    header: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    launches: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What held from each resume on, as the header does from the start: `step` (steps done before), ranks, seed, horizon ..."""

    def launch_of(self, step: int) -> dict[str, Any]:
        """What held in `step`; of a file without launches what its header says."""
        covering = [launch for launch in self.launches if int(launch.get("step", 0)) < step]
        return self.header | (covering[-1] if covering else {})


def strict_json(value: Any) -> Any:
    """`value` with every non-finite number as a string, so that any JSON reader takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`, a line flushed at a time. One writer a run: rank 0's."""

    def __init__(self, run_dir: str | Path, header: Mapping[str, Any] | None = None, resume_step: int = 0) -> None:
        """Opens the file; keeps what it holds up to `resume_step` (0: a fresh start) and drops what is beyond.

        The header is written when the file is new. A damaged last line (the run was killed while writing) is dropped.
        """
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(self.path, resume_step)
        self._file: TextIO | None = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size == 0:
            self._append({"kind": "header", "format_version": FORMAT_VERSION, **(header or {})})
        else:
            self._append({"kind": "launch", "step": resume_step, **(header or {})})

    def step(self, record: StepRecord) -> None:
        """Appends a step."""
        self._append({"kind": "step", **record.as_dict()})

    def evaluation(self, record: EvaluationRecord) -> None:
        """Appends an evaluation."""
        self._append({"kind": "evaluation", **record.as_dict()})

    def close(self) -> None:
        """Flushes to disk and closes; a second call does nothing."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "the metrics writer is closed"
        self._file.write(json.dumps(strict_json(line), allow_nan=False, separators=(", ", ": ")) + "\n")
        self._file.flush()


def read_metrics(path: str | Path) -> Metrics:
    """Reads a metrics file or the one of a run folder.

    Raises:
        DataError: there is no such file, or a line before the last is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.is_file():
        raise DataError(
            f"no metrics at {path}",
            "a run folder holds metrics.jsonl",
            "give the run_dir that `trainwright train` printed",
        )
    header: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    launches: list[dict[str, Any]] = []
    for line in _lines(path):
        kind = line.pop("kind", "step")
        if kind == "header":
            header = line
        elif kind == "launch":
            launches.append(line)
        elif kind == "evaluation":
            evaluations.append(line)
        else:
            steps.append(line)
    return Metrics(header, steps, evaluations, launches)


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes `run_dir/summary.json`, what the report says beyond the curves. Every key is optional:

    name, status ("finished" | "stopped" | "failed"), started_at (text), training_time_s, steps, tokens,
    parameters, flops_per_token, world_size, strategy (text, such as "ZeRO-2 on 2 ranks"), precision,
    data: {name, path, version, tokens, documents, splits: {train: n, heldout: n}, vocab_size, tokenizer},
    samples: [{prompt, text, settings}] or plain texts, machine: {...} (default: this machine's),
    timings: {name: seconds}, final: {loss, val_loss, val_bits_per_byte, tokens_per_s, mfu}, checkpoint (path).
    """
    path = Path(run_dir) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(
        json.dumps(strict_json(summary), allow_nan=False, indent=2, default=str) + "\n", encoding="utf-8"
    )
    os.replace(scratch, path)
    return path


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """`summary.json` of a run; empty when there is none."""
    path = Path(run_dir) / SUMMARY_FILE
    if not path.is_file():
        return {}
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The file's objects; a damaged last line is left out, a damaged earlier one is an error."""
    damaged = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            if damaged:
                raise DataError(
                    f"{path}: line {damaged} is not JSON", "each line is one JSON object", "remove that line"
                )
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = None
            if not isinstance(line, dict):
                damaged = number
                continue
            if line.get("kind") == "header":
                yield line
            else:
                yield {
                    key: _NON_FINITE.get(item, item) if isinstance(item, str) else item for key, item in line.items()
                }


def _truncate(path: Path, resume_step: int) -> None:
    """Cuts the file before its first line beyond `resume_step`; a line that is not whole is cut too."""
    if not path.is_file():
        return
    keep_bytes = 0
    if resume_step > 0:
        with path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    break
                if not text.endswith(b"\n") or not isinstance(line, dict) or line.get("step", 0) > resume_step:
                    break
                keep_bytes += len(text)
    os.truncate(path, keep_bytes)
