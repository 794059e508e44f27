"""Sharded against unsharded: ZeRO stage x ranks x accumulation x format, on our transformer and on an awkward module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import Awkward, batches, plain_loop, relative, share, three_calls, transformer, with_values

import trainwright as tw

STEPS = {"batch": 20, "engine": 8, "plain": 8}
BUILDS = {"transformer": transformer, "awkward": Awkward}
CONFIG = {"gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}}


def _train(rank: int, world_size: int, case: tuple[str, int, int, int, str, str], steps: int) -> Any:
    kind, stage, replicate, accumulation, dtype, style = case
    config = CONFIG | {
        "zero": stage, "parallel": {"replicate": replicate}, "batch": {"accumulation": accumulation}, "precision": dtype,
    }  # fmt: skip
    engine = tw.initialize(model=BUILDS[kind], config=config)
    losses, norms = [], []
    for tokens, labels in batches(steps):
        mine = share(tokens, rank, world_size), share(labels, rank, world_size)
        if style == "batch":
            losses.append(engine.train_batch({"input_ids": mine[0], "labels": mine[1]}))
        else:
            three_calls(engine, *mine, plain=style == "plain")
            losses.append(engine.last_step.loss)
        norms.append(engine.grad_norm)
    state = engine.full_state_dict()
    engine.close()
    return losses, norms, state


def _train_all(rank: int, world_size: int, cases: list[Any]) -> list[Any]:
    return [_train(rank, world_size, case, STEPS[case[5]]) for case in cases]


def _cases(world_size: int) -> list[tuple[str, int, int, int, str, str]]:
    found = []
    for stage in (0, 1, 2, 3):
        found += [("transformer", stage, 1, accumulation, "fp64", "batch") for accumulation in (1, 3)]
        one, other = (1, 3) if stage % 2 else (3, 1)
        found.append(("transformer", stage, 1, one, "fp32", "batch"))
        found.append(("transformer", stage, 1, other, "fp64", "engine"))
        found.append(("awkward", stage, 1, one, "fp64", "plain"))
        if world_size == 4 and stage:
            found.append(("awkward", stage, 2, other, "fp64", "engine"))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_trains_what_one_unsharded_process_does(world_size: int) -> None:
    cases = _cases(world_size)
    results = run_ranks(_train_all, world_size, world_size, cases)[0]
    references = {
        (kind, dtype, steps): plain_loop(with_values(BUILDS[kind]).to(dtype), batches(steps))
        for kind in BUILDS
        for dtype in (torch.float64, torch.float32)
        for steps in set(STEPS.values())
    }
    for case, (losses, norms, state) in zip(cases, results, strict=True):
        exact = case[4] == "fp64"
        expected = references[case[0], torch.float64 if exact else torch.float32, STEPS[case[5]]]
        if losses[0] is not None:
            worst = max(relative(a, b) for a, b in zip(losses, expected[0], strict=True))
            assert worst < (1e-9 if exact else 1e-5), f"{case}: loss {worst:.2g}"
        assert relative(norms[0], expected[1][0]) < 1e-6, f"{case}: first gradient norm {norms[0]} for {expected[1][0]}"
        if exact:
            assert state.keys() == expected[2].keys(), case
            for name, tensor in expected[2].items():
                error = ((state[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)).item()
                assert error < 1e-8, f"{case}: {name} {error:.2g}"


def _halves(rank: int, world_size: int, cases: list[Any]) -> list[Any]:
    return [_train(rank, world_size, case, 6)[:2] for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_half_precision_follows_the_fp32_run(world_size: int) -> None:
    cases = [
        ("transformer", stage, 1, accumulation, dtype, "batch")
        for stage in (0, 1, 2, 3)
        for accumulation in (1, 3)
        for dtype in ("bf16", "fp16")
    ]
    results = run_ranks(_halves, world_size, world_size, cases)[0]
    losses, norms, _ = plain_loop(with_values(transformer), batches(6))
    for case, (found, found_norms) in zip(cases, results, strict=True):
        worst = max(relative(a, b) for a, b in zip(found, losses, strict=True))
        assert worst < (2e-2 if case[4] == "bf16" else 3e-3), f"{case}: loss {worst:.2g}"
        assert relative(found_norms[0], norms[0]) < (3e-2 if case[4] == "bf16" else 5e-3), case
