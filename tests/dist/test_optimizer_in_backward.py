"""Optimizer in backward against the plain update: the same weights, gradients that never lie together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import Awkward, batches, share, three_calls, transformer

import trainwright as tw
from trainwright.errors import NumericsError, UsageError
from trainwright.parallel.zero import FSDPModule
from trainwright.dry_run.step_watch import watching

STEPS = 4
BASE = {"optimizer": {"lr": 1e-2}, "lr_schedule": {"name": "linear", "warmup_steps": 2}, "steps": 20, "ema": 0.9}


def _train(rank: int, replicas: int, build: Any, config: dict[str, Any], calls: bool) -> Any:
    engine = tw.initialize(model=build, config=BASE | config)
    losses, norms = [], []
    replica = rank * replicas // torch.distributed.get_world_size()  # context and tensor ranks share one's rows
    data = batches(STEPS)
    if "gradient_clipping" not in config:
        data[2][1].fill_(-100)  # a step without a single valid token moves nothing
    for tokens, labels in data:
        mine = share(tokens, replica, replicas), share(labels, replica, replicas)
        if calls:
            three_calls(engine, *mine)
        else:
            engine.train_batch({"input_ids": mine[0], "labels": mine[1]})
        losses.append(engine.last_step.loss)
        norms.append(engine.grad_norm)
        assert all(p.grad is None for p in engine.module.parameters())
    state = engine.full_state_dict()
    with engine.averaged_weights():
        average = engine.full_state_dict()
    engine.close()
    return losses, norms, state, average


def _compare(rank: int, world_size: int) -> list[tuple[Any, float]]:
    found = []
    cases = [({"zero": stage}, calls) for stage in (0, 1, 2, 3) for calls in (False, True)]
    cases += [({"zero": 2, "optimizer": {"name": "sgd", "lr": 0.1}}, False)]
    cases += [({"zero": 3, "recompute": "full"}, False)]
    if world_size == 4:
        cases += [({"zero": stage, "parallel": {"tensor": 2}}, False) for stage in (1, 3)]
        cases += [({"zero": 2, "parallel": {"replicate": 2}}, True), ({"zero": 2, "parallel": {"context": 2}}, False)]
    cases += [({"zero": stage, "awkward": True}, True) for stage in (1, 3)]  # a block called twice, tied, unused, frozen
    for case, calls in cases:
        build = Awkward if case.pop("awkward", False) else transformer
        parallel = case.get("parallel", {})
        replicas = world_size // (parallel.get("tensor", 1) * parallel.get("context", 1))
        plain = _train(rank, replicas, build, case, calls)
        fused = _train(rank, replicas, build, case | {"fused": {"optimizer_in_backward": True}}, calls)
        worst = max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(fused[0] + fused[1], plain[0] + plain[1], strict=True))
        for one, other in ((fused[2], plain[2]), (fused[3], plain[3])):
            for name, tensor in other.items():
                worst = max(worst, ((one[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)).item())
        found.append(((case, calls), worst))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_weights_are_those_of_the_plain_update(world_size: int) -> None:
    for case, worst in run_ranks(_compare, world_size, world_size)[0]:
        assert worst < 1e-6, (case, worst)


def _clipped(rank: int, world_size: int) -> Any:
    found = []
    for clipping in ("per_parameter", "late"):
        config = {"gradient_clipping": 0.05, "fused": {"optimizer_in_backward": True, "clipping": clipping}}
        found.append([_train(rank, world_size, transformer, config | {"zero": stage}, False) for stage in (0, 3)])
    return found


def test_clipping_that_need_not_wait() -> None:
    """By each parameter's norm, and by the norm of the step before, against a plain loop that does the same."""
    results = run_ranks(_clipped, 2, 2)[0]
    from small import with_values

    for clipping, runs in zip(("per_parameter", "late"), results, strict=True):
        model = with_values(transformer)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95)
        )
        last = None
        for step, (tokens, labels) in enumerate(batches(STEPS)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * ((step + 1) / 3 if step < 2 else 1 - (step - 2) / 18)
            model(tokens, labels=labels).loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
            for p in model.parameters():
                own = p.grad.norm().item() if clipping == "per_parameter" else last
                p.grad *= 1.0 if own is None else min(1.0, 0.05 / (own + 1e-6))
            last = norm
            optimizer.step()
            optimizer.zero_grad()
        for _, _, state, _ in runs:
            for name, tensor in model.state_dict().items():
                assert ((state[name] - tensor).norm() / tensor.norm()).item() < 1e-4, (clipping, name)


def _peak(rank: int) -> tuple[float, float]:
    shares = []
    for in_backward in (False, True):
        build = lambda: transformer(layers=40, vocab_size=32)  # noqa: E731
        engine = tw.initialize(model=build, config={"zero": 3, "fused": {"optimizer_in_backward": in_backward}})
        tokens = torch.randint(0, 32, (1, 8))
        batch = {"input_ids": tokens, "labels": tokens}
        total = sum(p.numel() for p in engine.module.parameters())
        units = [m for m in engine.module.modules() if isinstance(m, FSDPModule)]
        assert max(sum(p.numel() for p in u.parameters()) for u in units if u is not engine.module) <= 0.03 * total
        engine.train_batch(batch)
        with watching(engine, 32) as watch:
            engine.train_batch(batch)
        shares.append(watch.live.largest["gradients"] / (4 * total))
        engine.close()
    return shares[0], shares[1]


def test_gradients_never_lie_together() -> None:
    plain, fused = run_ranks(_peak, 4)[0]
    assert plain > 0.2, "the watch sees gradients"
    assert fused <= 0.10, f"{fused:.1%} of the whole gradients' bytes"


def _misuse(rank: int) -> list[str]:
    found = []
    settings = {"fused": {"optimizer_in_backward": True}}
    engine = tw.initialize(model=transformer, config=settings)
    tokens, labels = batches(1)[0]

    class Broken(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    handle = engine.module.blocks[0].register_full_backward_pre_hook(fail)
    with pytest.raises(Broken):
        engine.train_batch({"input_ids": tokens, "labels": labels})
    handle.remove()
    for call in (lambda: engine.save("/nowhere"), lambda: engine(tokens, labels=labels), lambda: engine.full_state_dict()):
        with pytest.raises(UsageError, match="did not end") as caught:
            call()
        found.append(str(caught.value))
    engine = tw.initialize(model=transformer, config=settings)
    with torch.no_grad():
        next(engine.module.parameters()).fill_(float("inf"))
    with pytest.raises(NumericsError, match="start again from the last checkpoint"):
        engine.train_batch({"input_ids": tokens, "labels": labels})
    return found


def test_a_half_landed_step_is_never_saved() -> None:
    assert len(run_ranks(_misuse, 1)[0]) == 3
