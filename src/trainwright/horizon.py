"""How many steps a run has: from steps, tokens, epochs, or a duration that the first steps measure once."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from trainwright import distributed, storage
from trainwright.config import Config
from trainwright.data.batch import Batch, BatchPlan
from trainwright.engine import Engine
from trainwright.errors import ConfigError

HORIZON_FILE = "horizon.json"
_WARM_UP_STEPS = 3
_MEASURED_STEPS = 8
# Share of `duration` that is planned: evaluations' first calls, slow spells of a shared machine.
_PLANNED_SHARE = 0.97


def planned_steps(config: Config, plan: BatchPlan, epoch_sequences: int) -> int | None:
    """Steps of a run whose horizon is steps, tokens or epochs; None without a horizon or with a duration."""
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        return max(1, -(-config.tokens // (plan.stride * config.data.sequence_length)))
    if config.epochs is not None:
        return max(1, math.ceil(config.epochs * epoch_sequences / plan.stride))
    return None


def recorded_steps(run_dir: Path, duration_s: float) -> int | None:
    """Steps that an earlier launch of the run measured for this duration; the same on all ranks."""
    path = run_dir / HORIZON_FILE
    recorded = json.loads(path.read_text()) if distributed.is_main() and path.is_file() else None
    recorded = distributed.from_main(recorded)
    if recorded is None:
        return None
    if recorded["duration_s"] != duration_s:
        raise ConfigError(
            f"duration={duration_s:g}s in a run that was measured for {recorded['duration_s']:g}s",
            "the horizon is fixed once, so that the schedule stays a function of the step",
            f"duration={recorded['duration_s']:g}s, steps={recorded['steps']}, or another run_dir",
        )
    return int(recorded["steps"])


def measure_steps(
    build: Callable[[], Engine], batches: Callable[[], Batch], config: Config, run_dir: Path, evaluation_batches: int
) -> int:
    """Times a few steps (and evaluation batches) of a throw-away engine and fixes the number of steps. Collective.

    The engine's weights are thrown away: a run with a duration trains exactly what one with that many steps does.
    """
    assert config.duration is not None
    engine = build()
    times_s = []
    for index in range(_WARM_UP_STEPS + _MEASURED_STEPS):
        batch = batches()
        start_s = time.perf_counter()
        engine.train_batch(batch)
        if index >= _WARM_UP_STEPS:
            times_s.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    engine.evaluate([batch.split(batch.size // engine.parts.accumulation)[0]])
    evaluation_s = time.perf_counter() - start_s
    engine.close()
    step_s = statistics.mean(times_s)
    every = config.evaluate.every
    step_s += evaluation_s * evaluation_batches / every if every else 0.0
    steps = max(1, int(config.duration * _PLANNED_SHARE / step_s))
    steps = distributed.from_main(steps)
    if distributed.is_main():
        record = {"steps": steps, "duration_s": config.duration, "measured_step_s": step_s}
        storage.atomic_write_json(run_dir / HORIZON_FILE, record)
    return steps
