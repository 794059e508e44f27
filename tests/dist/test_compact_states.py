"""Moments and masters in bf16 under sharding: training follows fp32's, resumes are bitwise, other layouts take the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import batches, share, transformer

import trainwright as tw
from trainwright.errors import ContradictionError

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "moments": {"optimizer": {"lr": 1e-2, "moments": "bf16"}},
    "stochastic": {"precision": {"dtype": "bf16", "master": "bf16_stochastic"}},
    "kahan": {"precision": {"dtype": "bf16", "master": "bf16_kahan"}},
}
BASE = {"precision": "bf16", "optimizer": {"lr": 1e-2}, "gradient_clipping": 1.0}
STEPS = 30


def _go(engine: Any, rank: int, world_size: int, first: int, last: int) -> list[float]:
    data = batches(10)
    losses = []
    for step in range(first, last):
        tokens, labels = (share(t, rank, world_size) for t in data[step % 10])
        losses.append(engine.train_batch({"input_ids": tokens, "labels": labels}))
    return losses


def _train(rank: int, folder: Path) -> Any:
    found: dict[str, Any] = {}
    for name, form in FORMS.items():
        engine = tw.initialize(model=transformer, config=BASE | form | {"zero": 2})
        losses = _go(engine, rank, 2, 0, STEPS)
        engine.save(folder / name)
        further = _go(engine, rank, 2, STEPS, STEPS + 4)
        state = engine.full_state_dict()
        engine.close()
        again = tw.initialize(model=transformer, config=BASE | form | {"zero": 2})
        again.load(folder / name)
        resumed = _go(again, rank, 2, STEPS, STEPS + 4)
        same = all(torch.equal(state[key], value) for key, value in again.full_state_dict().items())
        kept = {t.dtype for key, t in again.parts.update.optimizer.state().items() if not key.endswith("step")}
        found[name] = (losses, further, resumed == further and same, kept)
        again.close()
    return found


def _alone(rank: int, folder: Path) -> Any:
    found = {}
    for name, form in FORMS.items():
        engine = tw.initialize(model=transformer, config=BASE | form | {"zero": 3})
        engine.load(folder / name)
        found[name] = _go(engine, 0, 1, STEPS, STEPS + 4)
        engine.close()
    return found


def test_narrow_states_train_resume_and_reshard(tmp_path: Path) -> None:
    found = run_ranks(_train, 2, tmp_path)[0]
    alone = run_ranks(_alone, 1, tmp_path)[0]
    plain = found["fp32"][0]
    for name, (losses, further, resumed, kept) in found.items():
        assert kept == {torch.float32 if name == "fp32" else torch.bfloat16}, name
        assert resumed, f"{name}: resumed otherwise"
        assert sum(losses[-5:]) == pytest.approx(sum(plain[-5:]), rel=0.02), name
        assert losses[-1] < losses[0]
        assert alone[name] == pytest.approx(further, rel=5e-3), name


@pytest.mark.parametrize(
    "config",
    [
        {"precision": {"dtype": "fp32", "master": "bf16_kahan"}},
        {"precision": {"dtype": "bf16", "master": "bf16_kahan"}, "optimizer": {"name": "muon"}},
        {"precision": {"dtype": "bf16", "master": "bf16_stochastic"}, "ema": 0.9},
        {"precision": {"dtype": "bf16", "master": "bf16_stochastic"}, "keep_fp32": ["head"]},
        {"optimizer": {"name": "lion", "moments": "bf16"}},
    ],
)
def test_what_narrow_states_cannot_do_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ContradictionError, match="master|moments"):
        tw.initialize(model=transformer, config=config)
