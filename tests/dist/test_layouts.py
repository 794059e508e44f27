"""A checkpoint belongs to no layout: written on one mesh, a run goes on on any other. And three axes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from small import batches, plain_loop, relative, share, transformer, with_values

import trainwright as tw
from trainwright.engine import Engine

STEPS, SAVED_AT = 6, 3
COMMON: dict[str, Any] = {
    "batch": {"accumulation": 2},
    "optimizer": {"lr": 1e-2},
    "gradient_clipping": 1.0,
    "precision": "fp64",
}
TENSOR = {"zero": 2, "parallel": {"tensor": 2}}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "pipeline 2 x shard 2": {"zero": 1, "parallel": {"pipeline": 2}},
    "context 2 x shard 2": {"zero": 3, "parallel": {"context": 2}},
    "tensor 2 x pipeline 2": {"zero": 0, "parallel": {"tensor": 2, "pipeline": 2}},
}


def _engine(changes: dict[str, Any]) -> Engine:
    return tw.initialize(model=transformer, config={**COMMON, **changes})


def _train(engine: Engine, steps: range) -> list[float]:
    mesh = engine.parts.mesh
    losses = []
    for tokens, labels in batches(STEPS)[steps.start : steps.stop]:
        part = [share(t, mesh.data_parallel_rank, mesh.data_parallel_size) for t in (tokens, labels)]
        losses.append(engine.train_batch({"input_ids": part[0], "labels": part[1]}))
    return losses


def _save_and_go_on(rank: int, folder: str) -> dict[str, list[float]]:
    engine = _engine(TENSOR)
    found = {"before": _train(engine, range(SAVED_AT))}
    engine.save(Path(folder) / "saved", state={"seen": SAVED_AT})
    found["uninterrupted"] = _train(engine, range(SAVED_AT, STEPS))
    engine.close()
    for name, changes in ELSEWHERE.items():
        found[name] = _resume(rank, folder, changes)
    return found


def _resume(rank: int, folder: str, changes: dict[str, Any]) -> list[float]:
    engine = _engine(changes)
    assert engine.load(Path(folder) / "saved") == {"seen": SAVED_AT}
    losses = _train(engine, range(engine.global_step, STEPS))
    engine.save(Path(folder) / "again")
    # What is written on this mesh is the same checkpoint again, a step count further.
    engine.load(Path(folder) / "again")
    assert engine.global_step == STEPS
    engine.close()
    return losses


def test_a_tensor_parallel_checkpoint_goes_on_in_every_other_layout(tmp_path: Path) -> None:
    four = run_ranks(_save_and_go_on, 4, str(tmp_path))
    expected = four[0]["uninterrupted"]
    reference = plain_loop(with_values(transformer).double(), batches(STEPS))[0]
    found = {
        **{name: four[0][name] for name in ELSEWHERE},
        "3 ranks": run_ranks(_resume, 3, str(tmp_path), {"zero": 2})[0],
        "1 rank": run_ranks(_resume, 1, str(tmp_path), {})[0],
    }
    for name, losses in found.items():
        assert max(map(relative, losses, expected)) < 1e-9, name
    assert all(relative(a, b) < 1e-9 for a, b in zip(expected, reference[SAVED_AT:], strict=True))
    for other in four[1:]:
        assert other == four[0], "every rank is told the same losses"


CUBES: dict[str, dict[str, Any]] = {
    "tensor 2 x pipeline 2 x shard 2": {"zero": 2, "parallel": {"tensor": 2, "pipeline": 2}},
    "tensor 2 x context 2 x shard 2": {"zero": 3, "parallel": {"tensor": 2, "context": 2}},
    "context 2 x pipeline 2 x replicate 2": {"zero": 0, "parallel": {"context": 2, "pipeline": 2}},
    "tensor 2 x replicate 2 x shard 2": {"zero": 1, "parallel": {"tensor": 2, "replicate": 2}},
    "tensor 2 x pipeline 2 x context 2": {"zero": 0, "parallel": {"tensor": 2, "pipeline": 2, "context": 2}},
}


def _cubes(rank: int) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    found = {}
    for name, changes in CUBES.items():
        engine = _engine(changes)
        losses = _train(engine, range(3))
        found[name] = (losses, engine.full_state_dict())
        engine.close()
    dist.barrier()
    return found


def test_three_axes_on_eight_ranks_train_the_same_model() -> None:
    losses, _, weights = plain_loop(with_values(transformer).double(), batches(3))
    found = run_ranks(_cubes, 8)[0]
    assert found.keys() == CUBES.keys()
    for name, (own, state) in found.items():
        assert max(map(relative, own, losses)) < 1e-9, name
        for key, value in weights.items():
            error = (state[key] - value).norm() / value.norm().clamp(min=1e-4)
            assert error < 1e-8, f"{name}: {key} {error}"
