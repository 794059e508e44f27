"""Float8 products, emulated on this machine: close to bf16, only in the blocks, with sharding and recomputation."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import trainwright as tw
from trainwright.errors import ConfigError, ContradictionError, ModelError
from trainwright.models.transformer import Transformer, TransformerSettings
from trainwright.parallel.float8 import apply_float8

pytest.importorskip("torchao")
SETTINGS = TransformerSettings(vocab_size=64, dim=32, layers=2, heads=2, kv_heads=2, ffn_dim=48, head_dim=16)


def train(rank: int, **changes: Any) -> list[float]:
    config = {"optimizer": {"lr": 1e-2}, **changes}
    engine = tw.initialize(model=lambda: Transformer(SETTINGS), config=config)
    losses = []
    for step in range(6):
        tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(2 * (step % 2) + rank))
        losses.append(engine.train_batch({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}))
    engine.close()
    return losses


CASES: tuple[dict[str, Any], ...] = (
    {"zero": 2, "batch": {"accumulation": 2}},
    {"zero": 3, "recompute": "full"},
    {"zero": 3, "fused": {"optimizer_in_backward": True}},
)


def _cases(rank: int) -> list[tuple[list[float], list[float], list[float]]]:
    warnings.simplefilter("ignore")  # the emulation says what it is
    return [
        (
            train(rank, precision="bf16", **case),
            train(rank, precision={"dtype": "bf16", "float8": "tensorwise"}, **case),
            train(rank, precision={"dtype": "bf16", "float8": "rowwise"}, **case),
        )
        for case in CASES
    ]


def test_float8_trains_like_bf16() -> None:
    for plain, tensorwise, rowwise in run_ranks(_cases, 2)[0]:
        assert plain[-1] < plain[0] - 0.3
        assert tensorwise != plain
        assert tensorwise == pytest.approx(plain, rel=3e-2)
        assert rowwise == pytest.approx(plain, rel=3e-2)


def test_only_layers_of_the_blocks_that_fit_are_swapped() -> None:
    model = Transformer(SETTINGS)
    model.blocks[1].ffn.up = nn.Linear(32, 40, bias=False)
    before = dict(model.named_parameters())
    units = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    with pytest.warns(UserWarning, match="emulated"):
        names = apply_float8(units, "tensorwise", torch.device("cpu"), keep=["blocks.0.attention.*"])
    assert names == ["blocks.0.ffn.gate", "blocks.0.ffn.up", "blocks.0.ffn.down"] + [
        f"blocks.1.{name}" for name in ("attention.q", "attention.k", "attention.v", "attention.out", "ffn.gate", "ffn.down")
    ]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert type(model.head).__name__ == "Linear"
    with pytest.raises(ModelError, match="without a layer"), pytest.warns(UserWarning, match="emulated"):
        apply_float8([("odd", nn.Linear(7, 7))], "rowwise", torch.device("cpu"))


def test_what_float8_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in ({"precision": {"dtype": "fp32", "float8": "rowwise"}},
                   {"precision": {"dtype": "bf16", "float8": "rowwise"}, "parallel": {"tensor": 2}}):  # fmt: skip
        with pytest.raises(ContradictionError, match="float8"):
            train(0, **config)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"trainwright\[gpu\]"):
        apply_float8([], "rowwise", torch.device("cpu"))


def test_torchao_is_imported_only_where_it_is_asked_for() -> None:
    code = "import sys, trainwright, trainwright.parallel.apply; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
