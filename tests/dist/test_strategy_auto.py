"""`strategy: auto` on real ranks: measured once, the same on all of them, and what is said of it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from texts import words
from rates import rates, remember

import trainwright as tw
from trainwright import distributed
from trainwright.cli import main
from trainwright.config import load_config
from trainwright.data import PrepareSettings, prepare
from trainwright.launch.run import launch_local
from trainwright.launcher_variables import read_launch
from trainwright.planner.calibrate import known_rates, rates_here

CONFIG = {"precision": "fp32", "strategy": "auto", "batch": {"global_size": 8}, "data": {"sequence_length": 16}}


def test_the_machine_is_measured_once() -> None:
    found = rates_here(2, ("float32", "bfloat16"), again=True)
    assert known_rates(2, ("float32", "bfloat16")) == found
    assert (found.ranks, found.threads) == (2, 1)
    for curves in found.moved.values():
        for curve in curves.values():
            assert [size for size, _ in curve] == sorted(size for size, _ in curve)
            assert curve[-1][1] > 3 * curve[0][1]  # a million times the bytes
    small, large = found.products["float32"]["32x32x32"], found.products["float32"]["512x512x512"]
    assert large > 20 * small > 0  # 4,096 times the work
    assert found.collectives["all-reduce"][-1][1] > found.collectives["all-reduce"][0][1]
    assert 0 < found.operator_s < 0.01
    assert 1 << 20 < found.process_bytes < 1 << 29


def on_a_rank(argv: list[str]) -> None:
    """Leaves what it was given and how it trained."""
    import torch
    from small import transformer

    engine = tw.initialize(model=transformer, config=CONFIG)
    losses = []
    for step in range(3):
        tokens = torch.arange(4 * 16).reshape(4, 16) % (11 + step)
        losses.append(float(engine.train_batch({"input_ids": tokens, "labels": tokens})))
    config = engine.parts.config.config
    found = [config.zero.stage, config.batch.micro_size, losses]
    Path(argv[0], f"{read_launch().rank}.json").write_text(json.dumps(found))
    engine.close()
    distributed.shutdown()


def test_all_ranks_take_what_rank_0_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(rates(2))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]))
    assert launch_local([str(tmp_path)], 2, tmp_path / "logs", entry="test_strategy_auto:on_a_rank") == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[1] in (1, 2, 4)


def refused_on_a_rank(argv: list[str]) -> None:
    """Leaves the error."""
    from small import transformer

    try:
        tw.initialize(model=transformer, config=CONFIG | {"batch": {}})
    except tw.errors.ConfigError as error:
        Path(argv[0], f"{read_launch().rank}.txt").write_text(str(error))
    distributed.shutdown()


def test_what_cannot_be_chosen_is_an_error_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(rates(2))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]))
    assert launch_local([str(tmp_path)], 2, tmp_path / "logs", entry="test_strategy_auto:refused_on_a_rank") == 0
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert "without a batch" in first
    assert first == second


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_says_what_it_took_and_how_that_went(ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    remember(rates(ranks))
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(words(index, 800))
    prepare(str(tmp_path), tmp_path / "data", PrepareSettings(vocab_size=300), progress=False)
    run = tmp_path / "run"
    settings = [f"data.path={tmp_path / 'data'}", "data.sequence_length=16", "batch.global_size=8", "steps=14", "precision=fp32"]
    model = "model.transformer={dim: 16, layers: 2, heads: 2}"
    assert main(["train", model, *settings, f"run_dir={run}", "strategy=auto", "--nproc", str(ranks)]) == 0
    out = capfd.readouterr().out
    assert "strategy auto:" in out
    assert "measured" in out
    saved = load_config(run / "config.yaml")
    assert saved.config.batch.micro_size
    assert "strategy: auto" in (run / "config.yaml").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["plan"]["measured"]["step_time_s"] > 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["plan"]["memory_bytes"] > 0
    assert "Planned and measured" in (run / "report.html").read_text()
