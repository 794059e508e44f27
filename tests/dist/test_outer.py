"""Groups of ranks that average: against plain data parallelism, against the rule written out, across layouts and resumes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from groups import prepare_data, run_groups, settings
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

import trainwright as tw
from trainwright.checkpoint.weights import initialise
from trainwright.data.batch import BatchPlan
from trainwright.data.loader import TokenLoader
from trainwright.data.mix import open_dataset
from trainwright.model_source import model_for
from trainwright.outer.diary import read_diary
from trainwright.outer.fragments import share_out
from trainwright.parallel.allocate import allocate
from trainwright.train import TrainingLoop

STEPS = 8
INNER_LR = 0.1
"""Of the rules written out: what two orders of adding up in fp32 leave in a gradient grows with it (1.4e-6 at 0.3, AVX-512)."""


class Weights(tw.Callback):
    """The whole weights at the end, on rank 0."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.found: dict[str, Tensor] = {}

    def on_step_end(self, loop: TrainingLoop, record: Any) -> None:
        if record.step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_end(self, loop: TrainingLoop, status: str) -> None:
        self.found = {name: t.clone() for name, t in loop.engine.full_state_dict().items()}


def _train(config: dict[str, Any], stop_after: int | None = None) -> dict[str, Tensor]:
    watch = Weights(stop_after)
    tw.run_training(tw.load_config(config), quiet=True, callbacks=[watch])
    return watch.found


class _AtTheEnd(Weights):
    """Changes the weights after the last step, as the last outer step does."""

    def on_last_step(self, loop: TrainingLoop) -> None:
        with torch.no_grad():
            next(loop.engine.module.parameters()).add_(1.0)


def _alone(rank: int, config: dict[str, Any]) -> dict[str, Tensor]:
    return _train(config)


def _group(rank: int, group: int, address: str, runs: list[tuple[dict[str, Any], int | None]]) -> list[dict[str, Tensor]]:
    found = []
    for config, stop_after in runs:
        outer = {**config["outer"], "group": group, "lighthouse": address, "timeout": 20, "start_wait": 60}
        found.append(_train({**config, "outer": outer}, stop_after))
    return found


def test_the_best_evaluation_at_the_end_is_saved_with_what_comes_after_the_last_step(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path, evaluate={"every": 4, "batches": 1, "keep_best": True, "final_batches": 1})
    watch = _AtTheEnd()
    tw.run_training(tw.load_config(config), quiet=True, callbacks=[watch])
    (last,) = (tmp_path / "checkpoints").glob("step-00000008*")
    saved: dict[str, Tensor] = {}
    for file in last.glob("*.safetensors"):
        saved |= {key.partition("@")[0]: value for key, value in load_file(file).items()}  # name@where it begins
    weights = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    assert "embedding.weight" in weights
    assert all(torch.equal(watch.found[name], value) for name, value in weights.items())


def _plain_data_parallel(**changes: Any) -> dict[str, Any]:
    return {"every": 1, "lr": 1.0, "momentum": 0.0, "overlap": False, "dtype": "fp32", "groups": 2, **changes}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def data_parallel(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """One process, the whole global batch."""
    return run_ranks(_alone, 1, settings(data, tmp_path_factory.mktemp("alone")))[0]


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        worst = (found[name] - tensor).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst}"


def test_a_step_each_is_plain_data_parallelism_in_every_layout(
    data: Path, data_parallel: dict[str, Tensor], tmp_path: Path
) -> None:
    """SGD inside, H=1, outer lr 1, momentum 0; two groups of two ranks that replicate, shard, and share matrices."""
    layouts: list[dict[str, Any]] = [{"zero": 0}, {"zero": 2}, {"zero": 3}, {"zero": 3, "parallel": {"tensor": 2}}]
    runs = [
        (settings(data, tmp_path / str(i), outer=_plain_data_parallel(), **layout), None)
        for i, layout in enumerate(layouts)
    ]
    found = run_groups(_group, 2, 2, runs)
    for index in range(len(layouts)):
        _assert_close(found[0][0][index], data_parallel)
        assert all(torch.equal(found[0][0][index][n], found[1][0][index][n]) for n in data_parallel)
    # Ranks that hold the same shards share the link: half each. Sharded ranks send their shards.
    lines = [read_diary(tmp_path / str(i) / "group-0") for i in (0, 2)]
    whole, half = (line[1]["sent_bytes"] for line in lines)
    numbers = sum(t.numel() for name, t in data_parallel.items())
    assert half == pytest.approx(numbers * 4 / 2, rel=0.2)
    assert whole == pytest.approx(numbers * 4 / 2, rel=0.2)


# --- the rule, written out ----------------------------------------------------------------------------------------


def _reference(data: Path, outer: dict[str, Any], lr: float = 0.3) -> dict[str, Tensor]:
    """Both groups in this process, a step at a time: torch's SGD inside, the outer step by hand."""
    config = tw.load_config(settings(data, Path("unused"))).config
    dataset = open_dataset(config.data)
    assert config.model is not None
    module, _ = model_for(config.model, dataset.vocab_size)
    allocate(module, torch.device("cpu"))
    initialise(module, config.seed)
    groups: list[dict[str, Tensor]] = []
    loaders = []
    for group in range(2):
        groups.append({n: p.detach().clone() for n, p in module.named_parameters()})
        plan = BatchPlan(4, 4, 1, group=group, groups=2)
        loaders.append(TokenLoader(dataset.split("train"), 16, plan, seed=config.seed, prefetch=0))
    shares = share_out({n: p.numel() for n, p in groups[0].items()}, outer["fragments"])
    shared = {n: p.clone() for n, p in groups[0].items()}
    momentum = {n: torch.zeros_like(p) for n, p in shared.items()}
    under_way: list[tuple[int, list[str], list[dict[str, Tensor]]]] = []

    def land(names: list[str], sent: list[dict[str, Tensor]], last: bool) -> None:
        for name in names:
            mean = sum((shared[name] - s[name] for s in sent), torch.zeros_like(shared[name])) / 2
            momentum[name] = outer["momentum"] * momentum[name] + mean
            shared[name] = shared[name] - outer["lr"] * (mean + outer["momentum"] * momentum[name])
            for own, was in zip(groups, sent, strict=True):
                if last or outer["delay"] == 0:
                    own[name] = shared[name].clone()
                elif "mixing" in outer:
                    own[name] = outer["mixing"] * own[name] + (1 - outer["mixing"]) * shared[name]
                else:
                    own[name] = shared[name] + own[name] - was[name]

    sendings = {(k + 1) * outer["every"] // outer["fragments"]: k % outer["fragments"] for k in range(99)}
    for step in range(1, STEPS + 1):
        for own, loader in zip(groups, loaders, strict=True):
            _sgd(module, own, next(loader), lr)
        while under_way and under_way[0][0] + outer["delay"] <= step:
            land(*under_way.pop(0)[1:], last=False)
        if step in sendings:
            names = shares[sendings[step]]
            under_way.append((step, names, [{n: own[n].clone() for n in names} for own in groups]))
            if outer["delay"] == 0:
                land(*under_way.pop(0)[1:], last=False)
    for _, names, sent in under_way:
        land(names, sent, last=False)
    if outer["delay"] or outer["fragments"] > 1 or STEPS not in sendings:
        for names in shares:
            land(names, [{n: own[n].clone() for n in names} for own in groups], last=True)
    return shared


def _sgd(module: torch.nn.Module, weights: dict[str, Tensor], batch: Any, lr: float) -> None:
    own = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    logits = torch.func.functional_call(module, own, (batch.input_ids,), {"return_logits": True}).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
    for name, gradient in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
        weights[name] = weights[name] - lr * gradient


RULES: list[dict[str, Any]] = [
    {"every": 3, "fragments": 1, "delay": 0},
    {"every": 4, "fragments": 1, "delay": 2},
    {"every": 4, "fragments": 2, "delay": 1},
    {"every": 4, "fragments": 2, "delay": 1, "mixing": 0.5},
    {"every": 5, "fragments": 3, "delay": 0},
]


def _outer_section(rule: dict[str, Any]) -> dict[str, Any]:
    section = {"groups": 2, "lr": 0.7, "momentum": 0.9, "dtype": "fp32", "overlap": rule["delay"] > 0, **rule}
    if not rule["delay"]:
        del section["delay"]
    if "mixing" in rule:
        section["correction"] = "mix"
    return section


def test_synchronous_and_overlapped_training_follow_their_rule(data: Path, tmp_path: Path) -> None:
    runs = [
        (settings(data, tmp_path / str(i), outer=_outer_section(rule), optimizer__lr=INNER_LR), None)
        for i, rule in enumerate(RULES)
    ]
    found = run_groups(_group, 2, 1, runs)
    for index, rule in enumerate(RULES):
        expected = _reference(data, {"lr": 0.7, "momentum": 0.9, **rule}, lr=INNER_LR)
        _assert_close(found[0][0][index], expected)
        assert all(torch.equal(found[0][0][index][n], found[1][0][index][n]) for n in expected), rule


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    """Stopped between two outer steps, and with one under way; AdamW inside, int8 on the link, two ranks a group."""
    rules: list[dict[str, Any]] = [
        {"every": 3, "overlap": False, "dtype": "int8"},
        {"every": 4, "fragments": 2, "delay": 1, "dtype": "int4"},
        {"every": 4, "delay": 2, "dtype": "bf16", "correction": "mix"},
    ]
    runs: list[tuple[dict[str, Any], int | None]] = []
    for index, rule in enumerate(rules):
        for name, stop_after in (("whole", None), ("stopped", 4), ("stopped", None)):
            folder = tmp_path / f"{index}-{name}"
            config = settings(data, folder, outer={"groups": 2, **rule}, optimizer={"lr": 1e-2}, zero=2 * (index % 2))
            runs.append((config, stop_after))
    found = run_groups(_group, 2, 2, runs)
    for index in range(len(rules)):
        whole, stopped, resumed = (found[0][0][3 * index + i] for i in range(3))
        assert all(torch.equal(whole[n], resumed[n]) for n in whole), rules[index]
        assert not all(torch.equal(whole[n], stopped[n]) for n in whole)
        lines = read_diary(tmp_path / f"{index}-stopped" / "group-1")
        assert [line["kind"] for line in lines].count("start") == 2
    manifest = json.loads(
        next((tmp_path / "1-stopped" / "group-0" / "checkpoints").glob("step-*/manifest.json")).read_text()
    )
    assert manifest["scalars"]["state"]["callbacks"]["outer"]["under_way"]["step"] == 4


