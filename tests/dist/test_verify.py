"""`verify`: right strategies hold, planted faults are caught and named, the matrix runs, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import trainwright as tw
from ranks import run_ranks
from small import transformer, with_values
from trainwright import exchange
from trainwright.cli import main
from trainwright.config import load_config
from trainwright.parallel import collectives
from trainwright.verification import run as run_module
from trainwright.verification.cases import FROM_TRANSFORMERS, cases
from trainwright.verification.data import GivenBatches, rows_of
from trainwright.verification.matrix import run_matrix
from trainwright.verification.report import Verification
from trainwright.verification.source import ModelSource

CONFIG: dict[str, Any] = {
    "data": {"sequence_length": 6}, "batch": {"global_size": 12, "accumulation": 2},
    "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2},
}  # fmt: skip
BLOCK_1 = "blocks.1."


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _on_engine(plant: Any) -> Iterator[None]:
    """`plant(engine)` right after the engine is built."""
    build = run_module.build_engine

    def built(*args: Any, **kwargs: Any) -> Any:
        engine = build(*args, **kwargs)
        plant(engine)
        return engine

    with _swapped(run_module, "build_engine", built):
        yield


@contextmanager
def _dropped_reduce_scatter(rank: int) -> Iterator[None]:
    """The first reduce-scatter of a step's backward (that of the last block) leaves each rank with its own part."""
    reduce_scatter = exchange.reduce_scatter
    calls = [0]

    def dropped(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            output.copy_(input.chunk(dist.get_world_size())[rank])
            return None
        return reduce_scatter(output, input, *args, **kwargs)

    with _swapped(exchange, "reduce_scatter", dropped):
        yield


@contextmanager
def _dropped_all_reduce(rank: int) -> Iterator[None]:
    """The same where copies are summed: the first all-reduce of gradients is left out."""
    all_reduce, done = dist.all_reduce, []

    def dropped(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > 100 and not done:
            done.append(True)
            return None
        return all_reduce(tensor, *args, **kwargs)

    with _swapped(dist, "all_reduce", dropped):
        yield


def _scaled_loss(rank: int) -> Any:
    """Rank 1's second micro-batch counts one and a half times."""

    def plant(engine: Any) -> None:
        model, calls = engine.parts.model, [0]
        loss = model._loss

        def scaled(module: nn.Module, micro_batch: Any) -> Any:
            calls[0] += 1
            part = loss(module, micro_batch)
            return replace(part, sum=part.sum * 1.5) if rank == 1 and calls[0] % 2 == 0 else part

        model._loss = scaled

    return _on_engine(plant)


def _untied(rank: int) -> Any:
    def for_strategy(self: ModelSource) -> nn.Module:
        module: Any = self.build()
        module.head.weight = nn.Parameter(module.embedding.weight.detach().clone())
        return module

    return _swapped(ModelSource, "for_strategy", for_strategy)


def _neighbours_sample(rank: int, ids_too: bool = True) -> Any:
    """Rank 1 trains on rank 0's rows in step 2; `ids_too`: and says so."""

    def shares(self: GivenBatches, plan: Any, replica: int, replicas: int) -> Iterator[Any]:
        for step, batch in enumerate(self.batches):
            mine = rows_of(batch, *plan.row_range(replica, replicas), plan.rows)
            if step == 1 and replica == 1:
                other = rows_of(batch, *plan.row_range(0, replicas), plan.rows)
                mine = other if ids_too else replace(other, sample_ids=mine.sample_ids)
            yield mine

    return _swapped(GivenBatches, "shares", shares)


def _drifted_copy(rank: int) -> Any:
    """Rank 1's copy of a norm is a little off from the start."""

    def plant(engine: Any) -> None:
        if rank == 1:
            with torch.no_grad():
                dict(engine.module.named_parameters())["norm.weight"].to_local().mul_(1 + 1e-12)

    return _on_engine(plant)


def _gradient_left_on_its_tensor_rank(rank: int) -> Any:
    """Where activations enter layers cut by column, their gradient is not summed."""
    return _swapped(collectives._Enter, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


def _one_sided_tie(rank: int) -> Any:
    """The first and the last stage update their copies of a tied weight each with its own gradient."""

    def plant(engine: Any) -> None:
        engine.parts.model.finish_gradients = lambda: None

    return _on_engine(plant)


def _same_slice_twice(rank: int) -> Any:
    """Both context ranks take the first half of the sequence."""

    def plant(engine: Any) -> None:
        model = engine.parts.model
        if rank == 1:
            first = replace(model._sequence, rank=0)
            model.split = first.split

    return _on_engine(plant)


# name: (plant, config, kind of the problem, what it names)
FAULTS: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "dropped reduce-scatter": (_dropped_reduce_scatter, {"zero": 2}, "gradient", BLOCK_1),
    "dropped reduce-scatter, ZeRO 3": (_dropped_reduce_scatter, {"zero": 3}, "gradient", BLOCK_1),
    "dropped all-reduce": (_dropped_all_reduce, {"zero": 0}, "gradient", BLOCK_1),
    "scaled loss": (_scaled_loss, {"zero": 2}, "gradient", "in all rows rank 1's micro-batch 2 counts 1.5 times"),
    "untied": (_untied, {"zero": 2}, "tied", "head.weight"),
    "neighbour's sample": (_neighbours_sample, {"zero": 1}, "data", "rank 1"),
    "neighbour's tokens": (lambda rank: _neighbours_sample(rank, False), {"zero": 3}, "data", "rank 1"),
    "drifted copy": (_drifted_copy, {"zero": 0}, "replicas", "norm.weight"),
    "tensor: no sum": (
        _gradient_left_on_its_tensor_rank, {"parallel": {"tensor": 2, "sequence": False}}, "gradient", "norm.weight",
    ),
    "pipeline: one-sided tie": (_one_sided_tie, {"parallel": {"pipeline": 2}}, "gradient", "embedding.weight"),
    "context: same slice twice": (_same_slice_twice, {"parallel": {"context": 2}}, "data", "rank 0, 1 trained on other"),
}  # fmt: skip


def _verify_faults(rank: int) -> dict[str, Verification]:
    found = {}
    for name, (plant, config, _, _) in FAULTS.items():
        with plant(rank):
            model = with_values(transformer) if name == "untied" else transformer
            found[name] = tw.verify(model, CONFIG | config, steps=2)
    found["none"] = tw.verify(transformer, CONFIG | {"zero": 2, "precision": "bf16"}, steps=2)
    return found


@pytest.fixture(scope="module")
def faults() -> dict[str, Verification]:
    results = run_ranks(_verify_faults, 2)
    first, second = ({name: found.ok for name, found in result.items()} for result in results)
    assert first == second
    return results[0]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(faults: dict[str, Verification], name: str) -> None:
    found, (_, _, kind, named) = faults[name], FAULTS[name]
    assert not found.ok
    assert found.status == "failed"
    problems = [p for p in found.problems if p.kind == kind]
    assert problems, [p.what for p in found.problems]
    assert any(named in p.what for p in problems), [p.what for p in problems]
    row = json.loads(json.dumps(found.to_json()))
    assert row["ok"] is False
    if kind == "gradient":
        assert row["worst_error"] > 1e-8
        assert row["layout"]


def test_a_dropped_reduction_is_told_rank_by_rank(faults: dict[str, Verification]) -> None:
    for name in ("dropped reduce-scatter", "dropped reduce-scatter, ZeRO 3"):
        first = next(p for p in faults[name].problems if p.kind == "gradient")
        assert "in the rows of rank 0 rank 1's micro-batch 1 counts 0 times" in first.what
        assert "in the rows of rank 1 rank 0's micro-batch 1 counts 0 times" in first.what
        assert "shard=2" in (first.layout or "")
        others = [p.parameter for p in faults[name].problems if p.kind == "gradient"]
        assert all(p is not None and p.startswith(BLOCK_1) for p in others)


def test_the_same_strategy_without_a_fault_holds(faults: dict[str, Verification]) -> None:
    found = faults["none"]
    assert found.ok, found.reason
    assert [run.dtype for run in found.runs] == ["fp64", "bf16"]
    exact = found.runs[0]
    assert exact.loss_error < 1e-12
    assert exact.worst is not None
    assert exact.worst.gradient_error < 1e-12
    assert {p.name for p in exact.parameters} == {n for n, _ in transformer().named_parameters()}


def _matrix(rank: int, part: str) -> Any:
    """Cases of our models, no two of one kind, or the layouts that need eight ranks."""
    base = load_config({"gradient_clipping": 1.0, "optimizer": {"lr": 1e-3}})
    picked: dict[Any, Any] = {}
    for case in cases():
        layout = {k: v for k, v in case.changes.items() if k.startswith("parallel.")}
        kind = (case.model, case.note, tuple(sorted(layout.items())), case.changes.get("recompute.mode"))
        if case.model not in FROM_TRANSFORMERS:
            picked.setdefault(kind, case)
    three_axes = [c for c in cases() if c.ranks == 8][3::5]
    wanted = three_axes if part == "three axes" else [c for c in picked.values() if 4 % c.ranks == 0][1::5]
    return run_matrix(base, steps=2, wanted=wanted).to_json()


@pytest.mark.parametrize(("part", "ranks"), [("of each kind", 4), ("three axes", 8)])
def test_a_part_of_the_matrix_holds(part: str, ranks: int) -> None:
    matrix = run_ranks(_matrix, ranks, part)[0]
    assert matrix["failed"] == 0, [(r["name"], r["reason"]) for r in matrix["rows"] if r["status"] == "failed"]
    assert matrix["held"] >= (8 if ranks == 4 else 1)
    assert matrix["need_other_ranks"] == 0
    for row in matrix["rows"]:
        assert (row["status"] == "refused") == bool(row["reason"]), row["name"]
        assert row["status"] == "refused" or row["worst_error"] < 1e-12


def test_the_ranks_of_the_command_line_share_one_verdict() -> None:
    """Two ranks through the launcher: the table on rank 0, the verdict in the exit code, errors as everywhere."""
    command = [
        sys.executable,
        "-m",
        "trainwright.cli",
        "verify",
        "gradient_clipping=1.0",
        "--nproc",
        "2",
        "--steps",
        "2",
    ]
    command += ["--matrix", "--only", "transformer: zero 2, accumulation 3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compositions held on 2 ranks, 0 refused" in done.stdout


def test_the_command_ends_with_the_verdict(tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "verify.yaml"
    config.write_text(
        "model: {transformer: {vocab_size: 37, dim: 24, layers: 2, heads: 4, ffn_dim: 40}}\n"
        "data: {sequence_length: 6}\nbatch: {global_size: 4, accumulation: 2}\nzero: 2\n"
    )
    arguments = ["verify", str(config), "--steps", "2", "--json"]
    assert main([*arguments, "optimizer.name=lion", "optimizer.lr=0.001"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["ok"]
    assert {"name", "ok", "worst_error", "worst_parameter", "layout"} <= set(held["rows"][0])
    with _scaled_loss(1):
        assert main(arguments) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
    assert main(["verify", str(config), "--steps", "1"]) == 0
    assert "every figure is within its tolerance" in capsys.readouterr().out
