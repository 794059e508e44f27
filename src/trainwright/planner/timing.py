"""How long something takes on all ranks of this machine: single calls, and steps of models that every machine can train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainwright import distributed
from trainwright.config.load import load_config
from trainwright.config.model_schema import ModelConfig
from trainwright.dry_run.step_watch import StepWatch, watching
from trainwright.launch.run import usable_cores
from trainwright.models.build import build
from trainwright.monitor.flops import resident_bytes
from trainwright.planner.processor import Rates, processor_time
from trainwright.startup import UserParts, build_engine

_BLOCKS = 2
_BLOCK_S = 0.006
_MOST_CALLS = 300
_SMALL_S = 0.05
"""A step shorter than this is measured in blocks."""
TINY = {"dim": 32, "layers": 4, "heads": 2, "vocab_size": 64, "ffn_dim": 64}
"""A model too small for its work to count: what is left is what operators cost the host."""
WHOLE = {"dim": 256, "layers": 4, "heads": 4, "vocab_size": 4096}
"""A model whose step is mostly work: some tenths of a second."""
_WARM_UP_STEPS, _STEPS = 2, 3


def seconds_of(act: Callable[[], Any]) -> float:
    """Of one call, all ranks at work: the best of some blocks of equally many calls, since some calls are collective. What
    else the machine does now and then is not the machine's speed; where ranks share a core, blocks are long enough to hold
    the turns of all of them."""
    act()  # picks kernels, allocates
    began = time.perf_counter()
    act()
    once = distributed.agree_max(time.perf_counter() - began, torch.device("cpu"))
    wanted = 3 * _BLOCK_S if crowded() else _BLOCK_S
    calls = max(1, min(_MOST_CALLS, math.ceil(wanted / once)))
    blocks = []
    for _ in range(_BLOCKS):
        began = time.perf_counter()
        for _ in range(calls):
            act()
        blocks.append((time.perf_counter() - began) / calls)
    return min(blocks)


def crowded() -> bool:
    """Ranks share cores."""
    return dist.get_world_size() * torch.get_num_threads() > usable_cores()


@dataclass(frozen=True)
class Trained:
    """Steps of a model, as a run takes them."""

    best_s: float
    seconds: list[float]
    """Of single steps, on the slowest rank."""
    grown_bytes: int
    """Of the process, from before it had a model."""
    watch: StepWatch

    @property
    def operators(self) -> int:
        return self.watch.operators

    def told_s(self, rates: Rates) -> float:
        """By the sum of its parts."""
        return processor_time(
            rates, self.watch.work.counts.items(), self.watch.log.counts.items(), self.operators
        ).total


def reference() -> Trained:
    """Steps of `WHOLE` on all ranks. Collective."""
    return trained(WHOLE, micro_size=2, length=256)


def trained(shape: dict[str, int], micro_size: int, length: int) -> Trained:
    before = resident_bytes()
    model = ModelConfig.model_validate({"transformer": shape})
    config = load_config({"precision": "fp32", "batch": {"micro_size": micro_size}, "guard": {"watch": False}})
    vocab_size = shape["vocab_size"]
    engine = build_engine(lambda: build(model, vocab_size), config, UserParts(), None)
    tokens = torch.arange(micro_size * length).reshape(micro_size, length) * 7 % vocab_size
    batch = {"input_ids": tokens, "labels": tokens}
    for _ in range(_WARM_UP_STEPS):
        engine.train_batch(batch)
    grown = resident_bytes() - before
    with watching(engine, vocab_size) as watch:
        engine.train_batch(batch)
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        engine.train_batch(batch)
        seconds.append(distributed.agree_max(time.perf_counter() - began, torch.device("cpu")))
    small = min(seconds) < _SMALL_S
    best_s = seconds_of(lambda: [engine.train_batch(batch) for _ in range(8)]) / 8 if small else min(seconds)
    engine.close()
    return Trained(best_s, seconds, max(0, grown), watch)
