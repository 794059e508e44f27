"""Gradients that are sent behind the next unit's backward are those that are waited for, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ranks import run_ranks
from small import VOCAB, Awkward
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import trainwright as tw
from trainwright import exchange
from trainwright.parallel.overlap import Overlap

CONFIG: dict[str, Any] = {"seed": 3, "optimizer": {"lr": 1e-2}}


def _batch(step: int, rank: int, rows: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def _trained(engine: tw.Engine, rank: int, rows: int) -> list[float]:
    return [engine.train_batch(_batch(step, rank, rows)) for step in range(3)]


def _called_by_hand(engine: tw.Engine, rank: int, _rows: int) -> list[float]:
    """Gradients read between backward and step; two forwards in one backward; two forwards, then two backwards."""
    norms: list[float] = []
    for step in range(3):
        parts = [_batch(10 * step + i, rank, 2) for i in range(2)]
        losses = [engine(**part)["loss"] for part in parts]
        if step < 2:
            engine.backward(sum(losses[1:], losses[0]))
        else:
            for loss in losses:
                engine.backward(loss)
        norms += [float(p.grad.to_local().norm()) for p in engine.module.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        engine.step()
    return norms


def _penalised(engine: tw.Engine, rank: int, _rows: int) -> list[float]:
    """A penalty on the shards themselves, made before the forward: its gradients come when most have been reduced."""
    norms: list[float] = []
    for step in range(3):
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in engine.module.parameters()]
        penalty = sum(((shard**2).sum() for shard in shards), torch.zeros(()))
        engine.backward(engine(**_batch(step, rank, 2))["loss"] + 0.05 * penalty)
        norms += [float(p.grad.to_local().norm()) for _, p in engine.parts.update.parameters if p.grad is not None]  # type: ignore[attr-defined]
        engine.step()
    return norms


class _Broken(torch.autograd.Function):
    """Identity, whose backward raises where it is told to."""

    armed = False

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        if _Broken.armed:
            raise RuntimeError("broken")
        return gradient


def _break_first_block(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_Broken.apply(inputs[0]), *inputs[1:])


def _broken_between(engine: tw.Engine, rank: int, rows: int) -> list[float]:
    """A backward that ends early on every rank, with gradients on their way, and steps after it."""
    engine.module.blocks[1].register_forward_pre_hook(_break_first_block)  # type: ignore[index, union-attr, operator]
    losses = [engine.train_batch(_batch(0, rank, rows))]
    _Broken.armed = True
    try:
        engine.train_batch(_batch(1, rank, rows))
    except RuntimeError as error:
        assert "broken" in str(error)
    _Broken.armed = False
    return losses + [engine.train_batch(_batch(step, rank, rows)) for step in range(2, 5)]


CASES: dict[str, tuple[Callable[[tw.Engine, int, int], list[float]], dict[str, Any]]] = {
    "stage 1": (_trained, {"zero": 1}),
    "stage 2": (_trained, {"zero": 2}),
    "stage 3": (_trained, {"zero": 3, "precision": "bf16"}),
    "bf16": (_trained, {"zero": 1, "precision": "bf16", "keep_fp32": ["blocks.1"]}),
    "bf16, micro-batches": (_trained, {"zero": 1, "precision": "bf16", "batch": {"accumulation": 3}}),
    "stage 1, micro-batches": (_trained, {"zero": 1, "batch": {"accumulation": 3}}),
    "stage 2, micro-batches": (_trained, {"zero": 2, "batch": {"accumulation": 3}}),
    "stage 3, micro-batches": (_trained, {"zero": 3, "batch": {"accumulation": 3}}),
    "16-bit sums": (_trained, {"zero": 2, "precision": {"dtype": "bf16", "reduce_dtype": "bf16"}}),
    "optimizer in backward": (_trained, {"zero": 3, "fused": {"optimizer_in_backward": True}}),
    "by hand": (_called_by_hand, {"zero": 2, "batch": {"accumulation": 2}}),
    "penalised shards": (_penalised, {"zero": 2}),
    "penalised shards, stage 3": (_penalised, {"zero": 3}),
    "a backward that breaks": (_broken_between, {"zero": 2}),
}
WAITED_FOR = ("16-bit sums", "optimizer in backward")


def _both(rank: int) -> dict[str, tuple[list[float], list[float], int, int]]:
    """By case: numbers with and without overlap, and how many reductions went behind something."""
    found: dict[str, tuple[list[float], list[float], int, int]] = {}
    reduce_scatter, begin = exchange.reduce_scatter, Overlap.begin
    count = 0

    def counted(*args: Any, async_op: bool = False) -> Any:
        nonlocal count
        count += async_op
        return reduce_scatter(*args, async_op=async_op)

    exchange.reduce_scatter = counted
    for name, (train, config) in CASES.items():
        numbers, counts = [], []
        for overlaps in (True, False):
            Overlap.begin = begin if overlaps else (lambda self, adds_up_whole: self.hold())  # type: ignore[method-assign]
            count = 0
            engine = tw.initialize(model=Awkward, config={**CONFIG, **config})
            numbers.append(train(engine, rank, 2 * config.get("batch", {}).get("accumulation", 1)))
            counts.append(count)
            engine.close()
        found[name] = (numbers[0], numbers[1], counts[0], counts[1])
    return found


def test_late_gradients_are_the_same_gradients() -> None:
    for ranks in run_ranks(_both, 2):
        for name, (late, waited_for, late_count, waited_count) in ranks.items():
            assert late == waited_for, name
            assert waited_count == 0, name
            assert (late_count == 0) == (name in WAITED_FOR), name
