"""`verify --matrix`: every composition that fits the ranks, one after another in one start of the ranks."""

from __future__ import annotations

import gc
import importlib.util
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from trainwright import distributed
from trainwright.config import Resolved
from trainwright.errors import TrainwrightError
from trainwright.verification.cases import FROM_TRANSFORMERS, LENGTH, MODELS, ROWS, TITLES, VOCABULARY, Case, cases
from trainwright.verification.data import synthetic
from trainwright.verification.report import Verification
from trainwright.verification.source import source_of
from trainwright.verification.verify import STEPS, Shared, Subject, refusal, verify_subject

_COLLECT_EVERY = 10


@dataclass
class Matrix:
    """All rows, and what was left out."""

    rows: list[Verification] = field(default_factory=list)
    ranks: int = 1
    larger: int = 0
    """Cases that need more ranks, or another number of them."""
    time_s: float = 0.0

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def held(self) -> int:
        """Compositions that ran and are right."""
        return sum(row.status == "held" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """`verify --matrix --json`."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "ok": self.ok,
            "held": self.held,
            "failed": sum(row.status == "failed" for row in self.rows),
            "refused": sum(row.status == "refused" for row in self.rows),
            "need_other_ranks": self.larger,
            "ranks": self.ranks,
            "time_s": round(self.time_s, 1),
        }


def run_matrix(
    base: Resolved,
    steps: int = STEPS,
    wanted: Sequence[Case] | None = None,
    only: str | None = None,
    report: Callable[[Verification, int, int], None] = lambda row, done, total: None,
) -> Matrix:
    """Verifies every case that fits the ranks, with `base`'s optimizer, schedule, clipping and seed. Collective.

    wanted: instead of all cases. only: text in the names of those to run. report(row, rows so far, rows in all) is
    called after each row, on every rank.
    """
    began = time.perf_counter()
    distributed.start(base.config.parallel.backend)
    ranks = dist.get_world_size()
    todo = list(cases() if wanted is None else wanted)
    if only is not None:
        todo = [case for case in todo if only in _name(case)]
    fitting = [case for case in todo if ranks % case.ranks == 0]
    matrix = Matrix(ranks=ranks, larger=len(todo) - len(fitting))
    shared = Shared()
    for case in fitting:
        matrix.rows.append(_row(base, case, steps, shared))
        if len(matrix.rows) % _COLLECT_EVERY == 0:
            gc.collect()  # FSDP2's modules are cycles
        report(matrix.rows[-1], len(matrix.rows), len(fitting))
    matrix.time_s = time.perf_counter() - began
    return matrix


def _row(base: Resolved, case: Case, steps: int, shared: Shared) -> Verification:
    words, name = strategy_words(case), _name(case)
    if case.model in FROM_TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        return Verification(name, words, "refused", "transformers is not installed: pip install 'trainwright[hf]'")
    try:
        subject = _subject(_config(base, case), case, name, steps, shared)
        return verify_subject(subject, shared)
    except TrainwrightError as error:
        return Verification(name, words, "refused", refusal(error))
    except Exception as error:  # a fault of ours is a row, and the other rows still tell how far it reaches
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return Verification(name, words, "failed", f"{what} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})")


def _subject(resolved: Resolved, case: Case, name: str, steps: int, shared: Shared) -> Subject:
    config = resolved.config
    size, length, seed = config.batch.global_size, config.data.sequence_length, config.seed
    assert size is not None, "the matrix sets it"
    if (case.model, seed) not in shared.sources:
        shared.sources[case.model, seed] = source_of(MODELS[case.model], seed)
    step = (config.optimizer, config.loss, config.gradient_clipping, config.fused.clipping, config.data.document_mask)
    key = (case.model, size, length, *(str(part) for part in step), config.freeze)
    data = synthetic(VOCABULARY, size, length, steps, seed, config.data.document_mask)
    return Subject(name, resolved, shared.sources[case.model, seed], data, key=key)


def strategy_words(case: Case) -> str:
    """The strategy of a case in words, whether the config takes it or not."""
    parallel = {
        key.removeprefix("parallel."): value for key, value in case.changes.items() if key.startswith("parallel.")
    }
    words = [f"zero {case.changes['zero.stage']}"]
    words += [f"{axis} {parallel[axis]}" for axis in ("tensor", "context", "pipeline", "replicate") if axis in parallel]
    words += [parallel.get("pipeline_schedule", "1f1b")] if "pipeline" in parallel else []
    words.append(f"accumulation {case.changes['batch.accumulation']}")
    if "recompute.mode" in case.changes:
        words.append(f"recompute {case.changes['recompute.mode']}")
    return ", ".join([*words, case.changes["precision.dtype"]])


def _name(case: Case) -> str:
    words = [strategy_words(case)] + ([case.note] if case.note else [])
    return f"{TITLES.get(case.model, case.model)}: {', '.join(words)}"


def _config(base: Resolved, case: Case) -> Resolved:
    """The base config without its own model, data, layout and batch, under the case's changes."""
    reset: dict[str, Any] = {
        "model": None, "data": {"sequence_length": LENGTH}, "batch": {"global_size": ROWS}, "zero": {}, "parallel": {},
        "precision": {}, "recompute": {}, "offload": {}, "freeze": (), "keep_fp32": (), "compile": False, "init_from": None,
    }  # fmt: skip
    if "optimizer.name" in case.changes:
        reset["optimizer"] = {}
    kept = {k: v for k, v in base.sources.items() if k.split(".")[0] not in reset}
    cleared = Resolved(base.config, kept).replace("default", **reset)
    return cleared.replace("matrix", **{key.replace(".", "__"): value for key, value in case.changes.items()})
