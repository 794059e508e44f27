"""The dry run against reality: bytes and collectives of a real 4-rank run, formulas at 16,384 ranks, the command."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from trainwright import exchange
from trainwright.cli import main
from trainwright.config import load_config
from trainwright.data.batch import Batch
from trainwright.dry_run.run import DryRun, dry_run
from trainwright.dry_run.step_watch import watching
from trainwright.errors import ConfigError, ContradictionError, UsageError
from trainwright.models.build import build
from trainwright.startup import UserParts, build_engine

RANKS, ROWS, LENGTH = 4, 2, 24
MODEL = {"vocab_size": 515, "dim": 60, "layers": 3, "heads": 6, "kv_heads": 3, "ffn_dim": 90}
CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero": 0, "precision": "bf16"},
    "stage 1": {"zero": 1, "precision": "bf16"},
    "stage 2": {"zero": 2, "precision": "bf16"},
    "stage 3": {"zero": 3, "precision": "bf16"},
    "hybrid": {"zero": 3, "precision": "bf16", "parallel": {"replicate": 2}},
    "fp32": {"zero": 3, "precision": "fp32", "batch": {"micro_size": ROWS, "accumulation": 1}},
}


def _resolved(case: dict[str, Any]) -> Any:
    base: dict[str, Any] = {
        "model": {"transformer": MODEL},
        "batch": {"micro_size": ROWS, "accumulation": 2},
        "data": {"sequence_length": LENGTH},
        "gradient_clipping": 1.0,
    }
    return load_config(base | case)


def _storages() -> dict[int, tuple[int, torch.dtype]]:
    """Address -> (bytes, dtype) of every live tensor's storage, as the garbage collector finds them."""
    gc.collect()
    found: dict[int, tuple[int, torch.dtype]] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            local = getattr(thing, "_local_tensor", thing)
            if type(local) in (torch.Tensor, torch.nn.Parameter) and local.untyped_storage().nbytes():
                found[local.untyped_storage().data_ptr()] = (local.untyped_storage().nbytes(), local.dtype)
    return found


def _count_calls(counts: Counter[tuple[str, int, int]]) -> Any:
    """Counts what goes through the collectives' own functions (not what a dispatch mode sees)."""
    kinds = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_reduce": "all-reduce"}
    patch, inside = pytest.MonkeyPatch(), [0]
    for home, name in [(exchange, name) for name in kinds] + [(dist, "all_reduce")]:
        kind, original = kinds[name], getattr(home, name)

        def call(*args: Any, _original: Any = original, _kind: str = kind, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            group = next((v for v in values if isinstance(v, dist.ProcessGroup)), None)
            ranks = dist.get_world_size(group)
            if ranks > 1 and not inside[0]:
                counts[_kind, ranks, max(v.nbytes for v in values if isinstance(v, torch.Tensor))] += 1
            inside[0] += 1
            try:
                return _original(*args, **kwargs)
            finally:
                inside[0] -= 1

        patch.setattr(home, name, call)
    return patch


def measure(rank: int) -> dict[str, dict[str, Any]]:
    """By case: bytes of states and gradients, collectives and peak of a second step, on this rank."""
    found = {}
    gc.collect()
    gc.freeze()  # what stood before the first engine need not be looked through again
    for name, case in CASES.items():
        resolved = _resolved(case)
        before = _storages()
        held = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]  # no address is given anew
        model = resolved.config.model
        assert model is not None
        engine = build_engine(build(model), resolved, UserParts(), 10)
        rows = ROWS * engine.parts.accumulation
        tokens = torch.randint(0, MODEL["vocab_size"], (rows, LENGTH), generator=torch.Generator().manual_seed(rank))
        batch = Batch(tokens, tokens.clone(), None, torch.arange(rows), 0)
        engine.train_batch(batch)
        tables = sum(t.nbytes for t in (engine.module.rotary.cos, engine.module.rotary.sin))
        states = sum(n for a, (n, t) in _storages().items() if a not in before and t == torch.float32) - tables
        gradients: dict[int, int] = {}

        def note(*_: Any, engine: Any = engine, gradients: dict[int, int] = gradients) -> None:
            for _, p in engine.parts.update.parameters:
                storage = p.grad.to_local().untyped_storage()
                gradients[storage.data_ptr()] = storage.nbytes()

        hook = engine.optimizer.register_step_pre_hook(note)
        counts: Counter[tuple[str, int, int]] = Counter()
        patch = _count_calls(counts)
        with watching(engine, MODEL["vocab_size"]) as watch:
            engine.train_batch(batch)
        patch.undo()
        hook.remove()
        peaks = [watch.live.peak_bytes]
        while name == "fp32" and len(peaks) < 4:  # Gloo's thread may let go of a buffer late, and does not in each step
            with watching(engine, MODEL["vocab_size"]) as watch:
                engine.train_batch(batch)
            peaks.append(watch.live.peak_bytes)
        found[name] = {
            "states": states,
            "gradients": sum(gradients.values()),
            "collectives": counts,
            "peak": min(peaks),
        }
        engine.close()
        del engine, watch, held
    return found


def _largest(result: DryRun, kind: str) -> int:
    return next((row.largest_bytes for row in result.memory if row.kind == kind), 0)


def _at_update(result: DryRun, kind: str) -> int:
    return next((row.at_update_bytes for row in result.memory if row.kind == kind), 0)


def _between(result: DryRun, *kinds: str) -> int:
    return sum(row.between_steps_bytes for row in result.memory if row.kind in kinds)


def test_bytes_and_collectives_are_those_of_a_real_run() -> None:
    real = run_ranks(measure, RANKS)
    for name, case in CASES.items():
        for rank in (0, RANKS - 1) if name == "stage 3" else (RANKS - 1,):
            result, expected = dry_run(_resolved(case), RANKS, rank, this_processor=True), real[rank][name]
            assert _between(result, "parameters", "optimizer") == pytest.approx(expected["states"], rel=0.01), name
            assert _at_update(result, "gradients") == pytest.approx(expected["gradients"], rel=0.01), name
            collectives: Counter[tuple[str, int, int]] = Counter()
            for c, n in result.collectives:
                collectives[c.kind, c.ranks, c.size_bytes] += n
            assert collectives == expected["collectives"], f"{name}, rank {rank}"
            if name == "fp32":  # narrow products may go by way of fp32 on this processor, and not in the dry run
                assert result.peak_bytes == pytest.approx(expected["peak"], rel=0.01)
            axes = {c.axis for c, _ in result.collectives}
            assert axes == {"stage 0": {"replicate"}, "hybrid": {"replicate", "shard"}}.get(name, {"shard"})


def _overrides(*values: str) -> list[str]:
    return ["model.preset=llama-405b", "precision=bf16", "batch.micro_size=1", "data.sequence_length=4096", *values]


def test_gpus_exchange_gradients_in_the_reductions_format() -> None:
    def sent(this_processor: bool) -> int:
        found = dry_run(_resolved({"zero": 2, "precision": "bf16"}), RANKS, 0, this_processor=this_processor)
        return sum(c.size_bytes * n for c, n in found.collectives if c.kind == "reduce_scatter")

    assert sent(this_processor=False) == 2 * sent(this_processor=True)


def test_shards_of_16384_ranks() -> None:
    small = ["model.transformer.layers=1", "model.transformer.vocab_size=1024", "recompute=full"]
    result = dry_run(load_config(None, _overrides("zero=3", *small)), 16384, 5)
    # D rows over N > D... ranks: one row a rank, padded; K and V have 8 x 128 rows, of which ranks from 1,024 on have none.
    rows = {"q": 16384, "k": 16384, "v": 16384, "out": 16384, "gate": 4 * 16384, "up": 4 * 16384, "down": 53248}
    norms, embeddings = 3, 2 * 16384
    assert _between(result, "parameters") == 4 * (sum(rows.values()) + norms + embeddings)
    assert result.parameters == 1024 * 16384 * 2 + 3 * 16384 + 16384 * (2 * 16384 + 2 * 1024 + 3 * 53248)
    kinds = {(c.kind, c.ranks) for c, _ in result.collectives}
    assert ("all-gather", 16384) in kinds
    assert ("reduce-scatter", 16384) in kinds
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [1, 6])
def test_tensor_and_pipeline(rank: int) -> None:
    model = ["model.transformer={vocab_size: 64, dim: 32, layers: 4, heads: 4, ffn_dim: 64}"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "zero=2", "precision=bf16"]
    batch = ["batch.micro_size=2", "batch.accumulation=4", "data.sequence_length=16"]
    result = dry_run(load_config(None, [*model, *layout, *batch]), 8, rank)
    assert result.degrees == {"pipeline": 2, "replicate": 1, "shard": 2, "context": 1, "tensor": 2}
    assert result.coordinates["pipeline"] == rank // 4
    stream_bytes = 2 * (16 // 2) * 32 * 2  # micro-batch x T over the tensor ranks x D x 2 bytes
    passed = {(c.kind, c.size_bytes): n for c, n in result.collectives if c.axis == "pipeline"}
    assert passed["send", stream_bytes] == passed["receive", stream_bytes] == 4
    assert {c.axis for c, _ in result.collectives} == {"pipeline", "shard", "tensor"}


def test_loss_and_activations_are_told_apart() -> None:
    case = {"zero": 3, "precision": "fp32"}
    plain = dry_run(_resolved(case), 2)
    recomputed = dry_run(_resolved(case | {"recompute": "full"}), 2)
    tokens = ROWS * LENGTH
    assert _largest(plain, "logits") >= 4 * tokens * MODEL["vocab_size"]
    assert _largest(recomputed, "activations") < 0.7 * _largest(plain, "activations")
    assert _largest(plain, "whole_parameters") >= 4 * MODEL["vocab_size"] * MODEL["dim"]
    assert plain.between_steps_bytes == _between(plain, "parameters", "optimizer", "buffers")
    averaged = dry_run(_resolved(case | {"ema": 0.99, "offload": {"optimizer": "cpu"}}), 2)
    assert _between(averaged, "average") == 4 * averaged.rank_parameters
    assert averaged.notes


@pytest.mark.parametrize("world_size", [1, 2])
def test_work_inside_widened_operators_is_seen(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """Where bf16's products are made in fp32, inside operators of ours: as many as fp32 training has."""
    monkeypatch.setattr("trainwright.fused.linear._cpu_lacks", lambda dtype: dtype == torch.bfloat16)

    def flops(precision: str) -> Counter[str]:
        counts: Counter[str] = Counter()
        for work, count in dry_run(_resolved({"precision": precision}), world_size, this_processor=True).work:
            if work.flops:
                assert work.dtype == "float32"
                counts[work.kind] += int(work.flops * count)
        return counts

    assert flops("bf16") == flops("fp32")
    assert flops("fp32").keys() == {"product", "attention", "attention backward"}


def test_bf16_that_the_processor_multiplies_itself_is_seen_in_few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by large products counts as attention; the loss's small tiles are not gone through one by one."""
    monkeypatch.setattr("trainwright.fused.linear._cpu_lacks", lambda dtype: False)
    monkeypatch.setattr("trainwright.fused.product_attention.SERVES", True)
    monkeypatch.setattr("trainwright.fused.product_attention.SHORTEST", 1)
    monkeypatch.setattr("trainwright.fused.cross_entropy._TILE_ELEMENTS", 1)
    monkeypatch.setattr("trainwright.fused.cross_entropy._PRODUCT_ELEMENTS", 1)
    found = {p: dry_run(_resolved({"precision": p}), 1, this_processor=True) for p in ("fp32", "bf16")}
    flops = {p: Counter[str]() for p in found}
    for precision, result in found.items():
        for work, count in result.work:
            if work.flops:
                flops[precision][work.kind] += int(work.flops * count)
    assert flops["bf16"] == flops["fp32"]
    assert found["bf16"].operators < 2 * found["fp32"].operators
    elsewhere = dry_run(_resolved({"precision": "bf16"}), 1)
    assert elsewhere.operators < 1.5 * found["fp32"].operators
    assert _largest(elsewhere, "logits") >= _largest(found["bf16"], "logits")


@pytest.mark.parametrize(
    ("case", "bytes_a_value"),
    [
        ({"optimizer": {"moments": "bf16"}}, 4),
        ({"optimizer": {"moments": "8bit"}}, 2 + 8 / 64),
        ({"precision": {"dtype": "bf16", "master": "bf16_kahan"}}, 6),
        ({"precision": {"dtype": "bf16", "master": "bf16_stochastic"}, "optimizer": {"moments": "8bit"}}, 2 + 8 / 64),
    ],
)
def test_narrow_optimizer_states(case: dict[str, Any], bytes_a_value: float) -> None:
    """All matrices are of whole blocks; norms, in fp32 beside 8 bits, are a thousandth of the values."""
    sizes = {"vocab_size": 512, "dim": 128, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_dim": 256}
    found = dry_run(_resolved({"zero": 2, "precision": "bf16", "model": {"transformer": sizes}} | case), 2)
    assert _between(found, "optimizer") == pytest.approx(bytes_a_value * found.parameters / 2, rel=0.01)


def test_models_that_are_not_ours() -> None:
    """Their randomness is torch's generators', of which a dry run has none."""
    found = dry_run(_resolved({"zero": 2}), 2, model=lambda: _llama(), vocab_size=64)
    assert found.peak_bytes > found.parameters * 4
    assert found.operators > 100


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    )


def test_a_graph_of_other_machines_is_told_of() -> None:
    assert "held between steps" in " ".join(dry_run(_resolved({"fused": {"cuda_graphs": True}}), 1).notes)
    with pytest.raises(ContradictionError, match="on a CPU"):
        dry_run(_resolved({"fused": {"cuda_graphs": True}}), 1, this_processor=True)


def test_what_is_refused() -> None:
    config = _resolved({"zero": 1})
    with pytest.raises(ConfigError, match="ranks count from 0"):
        dry_run(config, 4, 4)
    with pytest.raises(ConfigError, match="model is not set"):
        dry_run(load_config({"batch": {"micro_size": 1}}), 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="process group"):
            dry_run(config, 4)
    finally:
        dist.destroy_process_group()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model.preset=llama-1m", "batch.micro_size=1", "data.sequence_length=32", "zero=3"]
    assert main(["plan", *arguments]) == 2
    assert "plan without --hardware" in capsys.readouterr().err
    assert main(["plan", *arguments, "--dry-run"]) == 2
    assert "--world-size 16384" in capsys.readouterr().err
    assert main(["plan", *arguments, "--dry-run", "--world-size", "8", "--rank", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["world_size"], facts["rank"], facts["coordinates"]["shard"]) == (8, 3, 3)
    assert facts["sent_bytes"] == sum(row["sent_bytes"] for row in facts["collectives"]) > 0
    assert facts["peak_bytes"] == sum(row["at_peak_bytes"] for row in facts["memory"])
    assert main(["plan", *arguments, "--dry-run", "--world-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "rank 0 of 8" in printed
    assert "reduce-scatter" in printed


@pytest.mark.slow
def test_the_largest_model_on_the_largest_mesh() -> None:
    arguments = _overrides("zero=1", "parallel.tensor=8", "parallel.pipeline=16", "batch.accumulation=16")
    command = [sys.executable, "-m", "trainwright.cli", "plan", *arguments, "--dry-run", "--world-size", "16384"]
    done = subprocess.run([*command, "--rank", "5", "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["process_memory_bytes"] < 1.5e9
    assert facts["parameters"] == 405853388800
    assert {row["axis"] for row in facts["collectives"]} == {"pipeline", "shard", "tensor"}
