"""Values that are no numbers, copies that part: the module, the parameter, the samples and the ranks are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import VOCAB, Awkward, batches, transformer, with_values
from torch import Tensor, nn

import trainwright as tw
from trainwright.data.batch import Batch
from trainwright.errors import NumericsError

POISON = VOCAB - 1


class Poisoned(Awkward):
    """Its third block overflows on one token."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, skip: bool = False) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for index, block in enumerate(self.blocks):
            x = block(x * torch.where(input_ids == POISON, float("inf"), 1.0).unsqueeze(-1) if index == 2 else x)
        logits = self.head(x)
        assert labels is not None
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


def _batch(rank: int, poisoned_row: int | None) -> Batch:
    tokens, labels = batches(1, rows=8, seed=rank)[0]
    tokens = tokens.clamp(max=POISON - 1)
    labels = labels.clamp(min=0)
    if poisoned_row is not None:
        tokens[poisoned_row, 3] = POISON
    return Batch(tokens, labels, None, torch.arange(8) + 100 * rank, 0)


def _non_finite(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (0, 3):
        config = {"zero": stage, "batch": {"accumulation": 2}}
        engine = tw.initialize(model=with_values(Poisoned), config=config)
        engine.train_batch(_batch(rank, None))
        assert engine.last_step.finding is None
        before = engine.full_state_dict()
        engine.train_batch(_batch(rank, 5 if rank == 1 else None))
        assert engine.last_step.skipped
        found[f"skip {stage}"] = engine.last_step.finding.describe()
        assert all(torch.equal(t, before[n]) for n, t in engine.full_state_dict().items())
        engine.train_batch(_batch(rank, 5))
        assert engine.last_step.finding is None  # the second in a row
        engine.train_batch(_batch(rank, None))
        assert not engine.last_step.skipped
        engine.close()
        engine = tw.initialize(model=with_values(Poisoned), config=config | {"guard": {"non_finite": "stop"}})
        with pytest.raises(NumericsError) as caught:
            engine.train_batch(_batch(rank, 2))
        found[f"stop {stage}"] = str(caught.value)
        engine.close()
    return found


def test_the_first_module_the_samples_and_the_ranks_are_named() -> None:
    for found in run_ranks(_non_finite, 2):
        for stage in (0, 3):
            told = found[f"skip {stage}"]
            assert told == "first non-finite output: module blocks.2.norm (rank 1); sample 105 (rank 1)"
            told = found[f"stop {stage}"]
            assert "the gradient of step 1 is not finite" in told
            assert "module blocks.2.norm (all ranks); samples 2 (rank 0), 102 (rank 1)" in told


def _copies(rank: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, config in {"replicate": {"zero": 0}, "tensor": {"zero": 1, "parallel": {"tensor": 2, "replicate": 2}}}.items():
        engine = tw.initialize(model=transformer, config=config | {"guard": {"replicas_every": 2}})
        tokens, labels = batches(1, rows=4)[0]
        for _ in range(4):
            engine.train_batch({"input_ids": tokens, "labels": labels})
        if rank == 2:
            weight = dict(engine.module.named_parameters())["blocks.1.attention_norm.weight"].to_local()
            weight.view(torch.int32)[3] ^= 1  # the lowest bit of one element
        engine.train_batch({"input_ids": tokens, "labels": labels})
        with pytest.raises(NumericsError) as caught:
            engine.train_batch({"input_ids": tokens, "labels": labels})
        found[name] = str(caught.value)
        engine.close()
    return found


def test_a_copy_that_has_drifted_is_named_with_its_rank() -> None:
    for found in run_ranks(_copies, 4):
        assert "after step 6 the copies of blocks.1.attention_norm.weight differ: rank 2 holds other values" in found["replicate"]
        assert "after step 6 the copies of" in found["tensor"]


def test_a_spike_is_kept_and_replayed_to_the_last_bit(tmp_path: Path) -> None:
    from trainwright.data import PrepareSettings, prepare
    from trainwright.replaying import describe, point_before, replay

    for index in range(6):
        (tmp_path / f"{index}.txt").write_text(" ".join(f"word{(i * i + index) % 97}" for i in range(400)))
    data = tmp_path / "tokens"
    prepare([str(tmp_path / "*.txt")], data, PrepareSettings(vocab_size=300, held_out=0.2), progress=False)
    config = {
        "model": {"transformer": {"layers": 2, "dim": 32, "heads": 4, "head_dim": 8, "ffn_dim": 48, "dropout": 0.1}},
        "data": {"path": str(data), "sequence_length": 16}, "batch": {"global_size": 4, "micro_size": 2}, "steps": 45,
        "checkpoint": {"every": 5, "keep": 2}, "run_dir": str(tmp_path / "run"), "optimizer": {"lr": 1e-3},
        "evaluate": {"final_batches": 1}, "guard": {"spike": 3.0},
    }  # fmt: skip

    class Jolt(tw.Callback):
        """Breaks the weights at step 38 for one step."""

        def on_step_end(self, loop: Any, record: Any) -> None:
            if record.step in (37, 38):
                with torch.no_grad():
                    for p in loop.engine.module.parameters():
                        p.mul_(3.0 if record.step == 37 else 1 / 3)

    tw.run_training(tw.load_config(config), quiet=True, callbacks=[Jolt()])
    incidents = sorted((tmp_path / "run" / "incidents").glob("*.json"))
    assert [path.name for path in incidents][0] == "step-00000038-spike.json"
    kept = json.loads(incidents[0].read_text())
    assert kept["checkpoint"] == "step-00000035"
    assert len(kept["samples"]) == 4
    assert (tmp_path / "run" / "checkpoints" / "step-00000035").is_dir()
    assert any(".txt" in name for name in kept["documents"])
    assert point_before(tmp_path / "run", 37)[0] == tmp_path / "run" / "checkpoints" / "step-00000035"
    found = replay(tmp_path / "run", 37)
    assert found.same
    assert {s.sample for s in found.samples}
    lines = describe(found, 0)
    assert "the same to the last bit" in lines
    assert not replay(tmp_path / "run", 38).same  # the jolt was from outside

    # The run goes on with other settings: each step is told and replayed by those of its own launch.
    from trainwright.data_seen import seen
    from trainwright.monitor.metrics import read_metrics

    trained: list[list[int]] = []

    class Watch(tw.Callback):
        def on_start(self, loop: Any) -> None:
            step = loop.engine.train_batch
            loop.engine.train_batch = lambda batch: (trained.append(batch.sample_ids.tolist()), step(batch))[1]

    longer = config | {"steps": 55, "seed": 9, "data": config["data"] | {"allow_change": True}}
    tw.run_training(tw.load_config(longer), quiet=True, callbacks=[Watch()])
    metrics = read_metrics(tmp_path / "run")
    assert [launch["step"] for launch in metrics.launches] == [45]
    assert (metrics.launch_of(45)["steps"], metrics.launch_of(46)["steps"], metrics.launch_of(46)["seed"]) == (45, 55, 9)
    told = seen(tmp_path / "run", (46, 55))
    assert told.samples.tolist() == [sample for batch in trained for sample in batch]
    whole = seen(tmp_path / "run")
    assert whole.samples[-40:].tolist() == told.samples.tolist()
    assert not told.problems
    assert replay(tmp_path / "run", 53).same
