"""The forecast of a step on this machine's processors: what is counted, how it is timed, and what is chosen by it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rates import rates, remember
from small import transformer
from texts import words
from trainwright.cli import main
from trainwright.config import load_config
from trainwright.data import PrepareSettings, prepare
from trainwright.dry_run.run import dry_run
from trainwright.dry_run.work import Work, WorkLog
from trainwright.errors import ConfigError
from trainwright.planner import room as rooms
from trainwright.planner.at_start import plan_run, strategy_for
from trainwright.planner.choose import Machines, Ways, choose, choose_among
from trainwright.planner.forecast import forecast
from trainwright.planner.processor import Rates, at, processor_time, work_s
from trainwright.planner.room import Room

MODEL = {"transformer": {"dim": 64, "layers": 3, "heads": 4, "vocab_size": 300}}
BASE: dict[str, Any] = {
    "model": MODEL,
    "precision": "fp32",
    "data": {"sequence_length": 64},
    "batch": {"global_size": 8},
}
LARGE = Room(1 << 40, "a terabyte")


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    root = tmp_path_factory.mktemp("data")
    for index in range(4):
        (root / f"{index}.txt").write_text(words(index, 800))
    prepare(str(root), root / "out", PrepareSettings(vocab_size=300), progress=False)
    return root / "out"


def _ways(ranks: int, config: dict[str, Any] | None = None, **given: float) -> Ways:
    return Ways(load_config(BASE | (config or {})), Machines(ranks, ranks, "cpu"), rates(ranks, **given))


# --- what is counted -------------------------------------------------------------------------------------------------


def test_products_are_those_that_torch_counts() -> None:
    model, tokens = transformer(), torch.randint(0, 32, (2, 16))
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, labels=tokens).loss.backward()
    theirs = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    config = {"precision": "fp32", "batch": {"micro_size": 2}, "data": {"sequence_length": 16}}
    run = dry_run(load_config(config), 1, model=transformer, vocab_size=32)
    ours = sum(work.flops * times for work, times in run.work if work.kind == "product")
    assert ours == sum(n for op, n in theirs.items() if "mm" in op)
    attention = sum(work.flops * times for work, times in run.work if work.kind.startswith("attention"))
    shape = model.settings
    assert attention == (4 + 10) * 2 * shape.heads * 16**2 * shape.head_dim * shape.layers  # all pairs, of 2 rows


def test_bytes_are_what_is_read_and_written() -> None:
    log, aten = WorkLog(), torch.ops.aten
    a, b = torch.zeros(10, 4), torch.zeros(10, 4)
    log.note(aten.add.Tensor, (a, b), {}, a + b)
    log.note(aten.view.default, (a, [40]), {}, a.view(40))  # costs nothing
    table, index = torch.zeros(1000, 8), torch.zeros(3, dtype=torch.int64)
    log.note(aten.embedding.default, (table, index), {}, torch.zeros(3, 8))  # not the whole table
    log.note(aten.silu.default, (a,), {}, a)
    assert log.counts == {
        Work("elementwise", "float32", (3 * 160,)): 1,
        Work("lookup", "float32", (2 * 96,)): 1,
        Work("activation", "float32", (2 * 160,)): 1,
    }


# --- how it is timed -------------------------------------------------------------------------------------------------


def test_curves_go_through_what_was_measured() -> None:
    curve = ((1e3, 1e-6), (1e5, 1e-4), (1e6, 4e-3))
    assert [at(curve, size) for size, _ in curve] == pytest.approx([seconds for _, seconds in curve])
    assert at(curve, 1e4) == pytest.approx(1e-5)
    assert at(curve, 10) == 1e-6  # a small one costs what the smallest did
    assert at(curve, 1e7) == pytest.approx(4e-2)


def test_products_between_measured_ones() -> None:
    known = rates()
    for shape in ((1, 32, 512, 8192), (3, 100, 200, 300), (1, 20000, 10, 512)):
        expected = 2.0 * math.prod(shape) / 5e10
        assert work_s(known, Work("product", "float32", shape)) == pytest.approx(expected)
    slow = {**known.products["float32"], "32x32x32": 1.0}
    slower = replace(known, products={"float32": slow})
    assert work_s(slower, Work("product", "float32", (1, 32, 32, 32))) == pytest.approx(1.0)
    assert work_s(slower, Work("product", "float32", (1, 512, 512, 512))) == pytest.approx(2 * 512**3 / 5e10)


def test_a_step_is_the_sum_of_its_parts() -> None:
    work = [(Work("product", "float32", (1, 512, 512, 512)), 3.0), (Work("update", "float32", (1 << 20,)), 1.0)]
    time = processor_time(rates(), work, (), 100)
    assert time.products == pytest.approx(3 * 2 * 512**3 / 5e10)
    assert time.update == pytest.approx((1 << 20) / 1e10)
    assert time.host == pytest.approx(1e-3)
    assert time.total == pytest.approx(time.products + time.update + time.host)


def test_all_parts_are_stretched_by_what_whole_steps_take() -> None:
    work = [(Work("product", "float32", (1, 512, 512, 512)), 3.0), (Work("update", "float32", (1 << 20,)), 1.0)]
    usual, slow = (processor_time(replace(rates(), stretch=s), work, (), 100) for s in (1.0, 1.9))
    assert vars(slow) == pytest.approx({part: 1.9 * seconds for part, seconds in vars(usual).items()})


def test_rates_survive_the_disk(tmp_path: Path) -> None:
    given = rates(2)
    assert Rates.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_micro_batches_that_were_left_out_are_counted() -> None:
    def seconds(accumulation: int) -> float:
        config = BASE | {"batch": {"micro_size": 2, "accumulation": accumulation}}
        time = forecast(load_config(config), 1, rates()).time
        assert time is not None
        return time.total

    two, three, eight = seconds(2), seconds(3), seconds(8)
    assert eight == pytest.approx(three + 5 * (three - two), rel=1e-6)


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_slow_links_ask_for_few_transfers() -> None:
    four = _ways(2, {"batch": {"global_size": 8, "micro_size": 1}}, message_s=0.5)
    chosen = choose_among(four, LARGE).changes["zero.stage"]
    seconds = {stage: four.way(stage, 1, "none").seconds for stage in (0, 1, 2, 3)}
    assert seconds[1] < seconds[2] < seconds[3]
    assert seconds[chosen] == min(seconds.values())


def test_slow_operators_ask_for_large_micro_batches() -> None:
    many = _ways(1, {"batch": {"global_size": 64}}, operator_s=1e-2)
    assert choose_among(many, LARGE).changes["batch.micro_size"] == max(many.micro_sizes[:3])


def test_what_is_set_is_kept() -> None:
    ways = _ways(2, {"zero": 3, "batch": {"global_size": 8, "micro_size": 2}, "recompute": "full"})
    chosen = choose_among(ways, LARGE)
    assert chosen.changes == {}
    assert [(w.stage, w.micro_size, w.recompute) for w in ways.looked_at()] == [(3, 2, "full")]


def test_memory_decides_where_it_must() -> None:
    ways = _ways(2)
    fastest = choose_among(ways, LARGE)
    least = min(way.forecast.memory_bytes for way in ways.ladder())
    assert fastest.forecast is not None
    assert least < fastest.forecast.memory_bytes
    tight = choose_among(ways, Room(least, "little"))
    assert tight.forecast is not None
    assert tight.forecast.memory_bytes == least
    with pytest.raises(ConfigError, match="may be taken: nothing"):
        choose_among(ways, Room(1000, "nothing"))


@pytest.mark.parametrize(
    ("total_gib", "stages"),
    [(80, (0, 1)), (24, (1, 2, 3))],  # 18 bytes a parameter of 2.7 billion are 46 GiB: whole ones fit at 80
)
def test_gpus_are_searched(total_gib: int, stages: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total_gib << 30, total_gib << 30))
    model = {"transformer": {"dim": 2560, "layers": 32, "heads": 32, "vocab_size": 32000}}
    large = BASE | {"model": model, "precision": "bf16", "parallel": {"tensor": 1, "pipeline": 1}}
    chosen = choose(load_config(large), Machines(4, 4, "cuda"))
    assert chosen.forecast is None, "that of CPUs"
    assert chosen.changes["zero.stage"] in stages
    assert "offload.optimizer" not in chosen.changes
    assert chosen.on_gpus is not None
    assert chosen.on_gpus.step_s > 0
    assert "H100" in chosen.why
    applied = chosen.apply(load_config(large)).config
    assert applied.batch.global_size == 8
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    with pytest.raises(ConfigError, match="nothing fits 4 x H100"):
        choose(load_config(large), Machines(4, 4, "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Voodoo 2")
    with pytest.raises(ConfigError, match="strategy=auto on Voodoo 2"):
        choose(load_config(large), Machines(4, 4, "cuda"))


def test_a_run_on_gpus_is_forecast(tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    large = {"transformer": {"dim": 2048, "layers": 8, "heads": 16}}
    config = BASE | {
        "model": large,
        "precision": "bf16",
        "data": {"path": str(plays), "sequence_length": 64},
        "steps": 100,
    }
    plan = plan_run(load_config(config), tmp_path)
    assert plan.step_s is not None
    assert plan.memory_bytes is not None
    held = dry_run(load_config(config), 1, vocab_size=300)
    assert plan.memory_bytes == pytest.approx(held.peak_bytes, rel=0.2)
    padded = load_config(config | {"batch": {"global_size": 13, "micro_size": 4}})
    assert plan_run(padded, tmp_path).step_s is not None
    monkeypatch.setattr(rooms, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(ConfigError, match="a checkpoint of"):
        plan_run(load_config(config), tmp_path)
    monkeypatch.setattr(rooms, "free_bytes", lambda _: 1 << 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 << 30, 9 << 30))
    assert "GiB a GPU are forecast" in plan_run(load_config(config), tmp_path).warnings[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 << 30, 7 << 30))
    with pytest.raises(ConfigError, match="nothing was allocated") as refused:
        plan_run(load_config(config), tmp_path)
    words = shlex.split(str(refused.value).split("remedy:")[1].rpartition("(")[0])
    assert plan_run(load_config(load_config(config), words), tmp_path).memory_bytes < plan.memory_bytes  # type: ignore[operator]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Voodoo 2")
    assert plan_run(load_config(config), tmp_path).step_s is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"parallel": {"pipeline": 2}}, "pipeline's time"), ({"batch": {}}, "without a batch")],
)
def test_what_cannot_be_chosen_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _ways(2, settings)


def test_one_rank_needs_no_stage() -> None:
    ways = _ways(1)
    choose_among(ways, LARGE)
    assert {way.stage for way in ways.looked_at()} == {0}


# --- at the start of a run -------------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_is_refused_with_one_that_can(
    tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = load_config(
        BASE | {"data": {"path": str(plays), "sequence_length": 64}, "steps": 100, "batch": {"global_size": 64}}
    )
    needed = plan_run(resolved, tmp_path).memory_bytes
    assert needed is not None
    assert plan_run(load_config(resolved, ["offload.optimizer=cpu"]), tmp_path).memory_bytes is None, "not reckoned"
    limit = Room(int(0.7 * needed), "a small machine")
    monkeypatch.setattr("trainwright.planner.at_start.room_for", lambda *_: limit)
    with pytest.raises(ConfigError) as refused:
        plan_run(resolved, tmp_path)
    assert "nothing was allocated" in str(refused.value)
    remedy = shlex.split(str(refused.value).split("remedy:")[1].rpartition("(")[0])
    assert any("global_size: 64" in word for word in remedy), "the same batch"
    smaller = load_config(resolved, remedy)
    fits = plan_run(smaller, tmp_path).memory_bytes
    assert fits is not None
    assert fits <= limit.memory_bytes
    monkeypatch.setattr("trainwright.planner.at_start.room_for", lambda *_: Room(needed // 2, "a small machine"))
    settled = load_config(resolved, ["recompute={mode: full, every: 2}"])
    with pytest.raises(ConfigError, match=r"nothing was allocated|at the least"):
        plan_run(settled, tmp_path)


def test_checkpoints_that_cannot_fit_are_refused(tmp_path: Path, plays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = load_config(BASE | {"data": {"path": str(plays), "sequence_length": 64}, "steps": 100})
    run = dry_run(resolved, 1)
    size = rooms.checkpoint_bytes(run)
    assert size == pytest.approx(12 * run.parameters, rel=0.01)  # AdamW in fp32
    monkeypatch.setattr(rooms, "free_bytes", lambda _: size - 1)
    with pytest.raises(ConfigError, match="a checkpoint of"):
        plan_run(resolved, tmp_path / "not" / "there")
    monkeypatch.setattr(rooms, "free_bytes", lambda _: 2 * size)
    every = resolved.replace("test", checkpoint__every=10)
    assert "checkpoint.keep=2 needs" in plan_run(every, tmp_path).warnings[0]


def test_short_and_small_runs_start_at_once(tmp_path: Path, plays: Path) -> None:
    resolved = load_config(BASE | {"data": {"path": str(plays), "sequence_length": 64}, "steps": 3})
    assert plan_run(resolved, tmp_path).memory_bytes is None


def test_the_users_own_model_is_planned_by_a_copy() -> None:
    remember(rates(1))
    module = transformer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    config = {
        "precision": "fp32",
        "strategy": "auto",
        "batch": {"global_size": 8},
        "data": {"sequence_length": 16},
    }
    try:
        resolved = strategy_for(module, load_config(config))
        assert resolved.config.batch.micro_size in (1, 2, 4, 8)
        with pytest.raises(ConfigError, match="a process group runs already"):
            strategy_for(module, load_config(config))
    finally:
        from trainwright import distributed

        distributed.shutdown()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_plan_for_ranks_of_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    remember(rates(2))
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(BASE))
    assert main(["plan", str(file), "--hardware", "2xCPU", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ranks"] == 2
    assert {s["zero"] for s in told["strategies"]} >= {0, 2}
    assert all(s["step_time_s"] > 0 and s["memory_bytes"] > 50 << 20 for s in told["strategies"])
    assert main(["plan", str(file), "--hardware", "2xcpu", "--explain", "--write", str(tmp_path / "new.yaml")]) == 0
    out = capsys.readouterr().out
    assert "where a step's time goes" in out
    assert "take ZeRO" in out
    assert load_config(tmp_path / "new.yaml").config.zero.stage == told["chosen"]["zero.stage"]
