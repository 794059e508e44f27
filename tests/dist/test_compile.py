"""torch.compile by blocks, with sharding, recomputation and tensor parallelism: the run is that without, and nothing is
compiled anew after the first steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ranks import run_ranks

import trainwright as tw
from trainwright.models.transformer import Transformer, TransformerSettings
from trainwright.parallel import compile as compiling
from trainwright.torch_private.compiler import compiled_graphs

SETTINGS = TransformerSettings(
    vocab_size=64, dim=32, layers=10, heads=4, kv_heads=2, ffn_dim=48, head_dim=8, dropout=0.1
)
CASES: dict[str, dict[str, Any]] = {
    "zero 2": {"zero": 2, "batch": {"accumulation": 2}},
    "zero 3, recompute full": {"zero": 3, "recompute": "full"},
    "zero 3, selective, bf16": {"zero": 3, "recompute": "selective", "precision": "bf16"},
    "tensor 2": {"parallel": {"tensor": 2}},
}


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(10 * step + rank))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def train(rank: int, **changes: Any) -> tuple[list[float], list[int]]:
    """(losses, graphs compiled so far after each step)."""
    engine = tw.initialize(model=lambda: Transformer(SETTINGS), config={"optimizer": {"lr": 1e-2}, **changes})
    losses, graphs = [], []
    rank = 0 if "parallel" in changes else rank
    for step in range(4):
        losses.append(engine.train_batch(batch(step, rank)))
        graphs.append(compiled_graphs())
        if step == 1:
            engine.evaluate([batch(9, rank)])
    engine.close()
    return losses, graphs


def _cases(rank: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", module="torch")
    return {name: (train(rank, compile=False, **c), train(rank, compile=True, **c)) for name, c in CASES.items()}


def test_compiled_blocks_train_the_same_model_and_are_compiled_once() -> None:
    for found in run_ranks(_cases, 2, timeout_s=540):
        for name, ((plain, _), (compiled, graphs)) in found.items():
            tolerance = 2e-2 if "bf16" in name else 2e-5
            assert all(abs(a - b) <= tolerance for a, b in zip(plain, compiled, strict=True)), (name, plain, compiled)
            assert graphs[-1] == graphs[0], f"{name}: {graphs}"
        # Ten layers with numbers of their own share graphs: there would be ten for each case otherwise.
        assert found["tensor 2"][1][1][-1] <= 16


def test_a_block_that_cannot_be_compiled_runs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def refuse(forward: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            raise TorchDynamoException("no compiler here")

        return compiled

    expected, _ = train(0, compile=False)
    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(compiling._Compiled, "failed", False)
    with pytest.warns(UserWarning, match=r"blocks\.0 cannot be compiled.*no compiler here.*compile=false") as told:
        found, _ = train(0, compile=True)
    assert found == expected
    assert len(told) == 1


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiling.worth_compiling(cuda, torch.float32, 0.0)
    monkeypatch.setattr(compiling, "cpu_bf16_is_fast", lambda: True)
    assert compiling.worth_compiling(cpu, torch.bfloat16, 1e15)
    assert not compiling.worth_compiling(cpu, torch.bfloat16, 0.0)
    assert not compiling.worth_compiling(cpu, torch.float32, 1e15)
    monkeypatch.setattr(compiling, "cpu_bf16_is_fast", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert compiling.worth_compiling(cpu, torch.bfloat16, 1e15)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not compiling.worth_compiling(cpu, torch.bfloat16, 1e15)


def test_a_compilation_after_the_warm_up_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [0]
    monkeypatch.setattr(compiling, "compiled_graphs", lambda: graphs[0])
    watch = compiling.CompileWatch(warm_up_steps=2)
    said = []
    for step, new in enumerate((4, 1, 0, 2, 3), start=1):
        watch.begin()
        graphs[0] += new
        said.append(watch.end(step))
        graphs[0] += 5  # an evaluation's
    assert [text is not None for text in said] == [False, False, False, True, False]
    assert "step 4: 2 graph(s)" in said[3]
