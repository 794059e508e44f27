"""Moments in bf16 and 8 bits, masters in bf16, under sharding: training follows fp32's, resumes are bitwise, other layouts take the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import batches, share, transformer

import trainwright as tw
from trainwright.errors import CheckpointError, ContradictionError, ModelError

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "moments": {"optimizer": {"lr": 1e-2, "moments": "bf16"}},
    "8 bits": {"optimizer": {"lr": 1e-2, "moments": "8bit"}},
    "8 bits in backward": {
        "optimizer": {"lr": 1e-2, "moments": "8bit"},
        "fused": {"optimizer_in_backward": True, "clipping": "per_parameter"},
    },
    "8 bits, bf16 masters": {
        "precision": {"dtype": "bf16", "master": "bf16_kahan"},
        "optimizer": {"lr": 1e-2, "moments": "8bit"},
    },
    "stochastic": {"precision": {"dtype": "bf16", "master": "bf16_stochastic"}},
    "kahan": {"precision": {"dtype": "bf16", "master": "bf16_kahan"}},
}
BASE = {"precision": "bf16", "optimizer": {"lr": 1e-2}, "gradient_clipping": 1.0}
STEPS = 30
KEPT = {"fp32": {torch.float32}, "8 bits": {torch.uint8, torch.float32}, "8 bits, bf16 masters": {torch.uint8, torch.float32, torch.bfloat16}}
KEPT["8 bits in backward"] = KEPT["8 bits"]


def _model() -> Any:
    """Matrices of whole blocks of 64 columns, and others (the second of each feed-forward)."""
    return transformer(dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=96)


def _state(engine: Any) -> dict[str, Any]:
    state = engine.parts.update.optimizer.state()
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for key, t in state.items()}


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
        engine = tw.initialize(model=_model, config=BASE | form | {"zero": 2})
        losses = _go(engine, rank, 2, 0, STEPS)
        engine.save(folder / name)
        further = _go(engine, rank, 2, STEPS, STEPS + 4)
        state = engine.full_state_dict()
        engine.close()
        again = tw.initialize(model=_model, config=BASE | form | {"zero": 2})
        again.load(folder / name)
        resumed = _go(again, rank, 2, STEPS, STEPS + 4)
        same = all(torch.equal(state[key], value) for key, value in again.full_state_dict().items())
        kept = {t.dtype for key, t in _state(again).items() if not key.endswith("step")}
        again.load(folder / name)
        found[name] = (losses, further, resumed == further and same, kept, _state(again))
        again.close()
    return found


def _alone(rank: int, folder: Path) -> Any:
    found = {}
    for name, form in FORMS.items():
        engine = tw.initialize(model=_model, config=BASE | form | {"zero": 3})
        engine.load(folder / name)
        state = _state(engine)
        found[name] = (_go(engine, 0, 1, STEPS, STEPS + 4), state)
        engine.close()
    for form, other in (("moments", "fp32"), ("fp32", "moments")):
        engine = tw.initialize(model=_model, config=BASE | FORMS[form])
        engine.load(folder / other)
        found[f"{form} from {other}"] = _go(engine, 0, 1, STEPS, STEPS + 4)
        engine.close()
    engine = tw.initialize(model=_model, config=BASE | FORMS["8 bits"])
    with pytest.raises(CheckpointError, match="lacks .*exp_avg_codes"):
        engine.load(folder / "moments")
    engine.close()
    return found


def test_narrow_states_train_resume_and_reshard(tmp_path: Path) -> None:
    found = run_ranks(_train, 2, tmp_path)[0]
    alone = run_ranks(_alone, 1, tmp_path)[0]
    plain = found["fp32"][0]
    for form, other in (("moments", "fp32"), ("fp32", "moments")):
        assert alone[f"{form} from {other}"] == pytest.approx(found[other][1], rel=5e-3), form
    for name, (losses, further, resumed, kept, state) in found.items():
        assert kept == KEPT.get(name, {torch.bfloat16}), name
        assert resumed, f"{name}: resumed otherwise"
        assert sum(losses[-5:]) == pytest.approx(sum(plain[-5:]), rel=0.03), name  # in backward, clipped otherwise: -2.1%
        assert losses[-1] < losses[0]
        on_one_rank, state_on_one_rank = alone[name]
        assert on_one_rank == pytest.approx(further, rel=5e-3), name
        assert state.keys() == state_on_one_rank.keys()
        assert all(torch.equal(state[key], value) for key, value in state_on_one_rank.items()), name


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


EIGHT_BITS = {"optimizer": {"lr": 1e-2, "moments": "8bit"}}


def _wide_model() -> Any:
    return transformer(dim=128, heads=4, kv_heads=2, head_dim=32, ffn_dim=128)


def _cut(rank: int, folder: Path) -> Any:
    config = BASE | EIGHT_BITS | {"parallel": {"tensor": 2}}
    with pytest.raises(ModelError, match="64 columns, 32 on each rank"):
        tw.initialize(model=_model, config=config)
    engine = tw.initialize(model=_wide_model, config=config)
    _go(engine, 0, 1, 0, 3)
    engine.save(folder / "cut")
    state = _state(engine)
    engine.close()
    return state


def _whole(rank: int, folder: Path) -> Any:
    engine = tw.initialize(model=_wide_model, config=BASE | EIGHT_BITS)
    engine.load(folder / "cut")
    state = _state(engine)
    engine.close()
    return state


def test_codes_and_scales_under_tensor_parallelism_are_those_of_one_rank(tmp_path: Path) -> None:
    state = run_ranks(_cut, 2, tmp_path)[0]
    whole = run_ranks(_whole, 1, tmp_path)[0]
    assert any(t.dtype == torch.uint8 for t in whole.values())
    assert all(torch.equal(state[key], value) for key, value in whole.items())
