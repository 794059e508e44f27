"""Cases where other engines fail today (each reproduced on them), by the numbers under which they are listed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import VOCAB, Awkward, batches, mean_loss, plain_loop, relative, share, transformer, with_values

import trainwright as tw
from trainwright.data.batch import BatchPlan
from trainwright.data.loader import TokenLoader
from trainwright.data.shards import TokenDataset
from trainwright.errors import CheckpointError, DataError, UsageError

SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0}


def _weights_after(rank: int, stage: int, accumulation: int, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    config = {"zero": stage, "batch": {"accumulation": accumulation}, "precision": "fp64", "optimizer": SGD}
    engine = tw.initialize(model=transformer, config=config)
    for tokens, labels in micro_batches:
        mean_loss(engine(tokens, labels=labels)).backward()
    engine.step()
    masked = engine.last_step.masked_micro_batches
    state = engine.full_state_dict()
    engine.close()
    return state, masked


def _uneven(counts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One row of 10 tokens for each count, with that many valid labels."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for count in counts:
        tokens = torch.randint(0, VOCAB, (1, 10), generator=generator)
        labels = torch.randint(0, VOCAB, (1, 10), generator=generator)
        labels[:, count:] = -100
        rows.append((tokens, labels))
    return rows


def _gradient_cases(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    (a, b), (c, d) = _uneven([9, 2]), _uneven([9, 2, 1, 7])[2:]
    for stage in (0, 1, 2, 3):
        found[f"by hand, stage {stage}"] = _weights_after(rank, stage, 2, [(a, b)[rank], (c, d)[rank]])
    engine = tw.initialize(model=transformer, config={"optimizer": SGD})
    mean_loss(engine(a[0], labels=a[1])).backward()
    with pytest.raises(UsageError, match="backward pass 2 of a step of 1"):
        mean_loss(engine(c[0], labels=c[1])).backward()
    engine.close()
    full, masked_row = _uneven([10, 0])
    found["masked"] = _weights_after(rank, 2, 1, [(full, masked_row)[rank]])
    return found


def _expected(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    model = with_values(transformer).double()
    tokens, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
    mean_loss(model(tokens, labels=labels)).backward()
    return {name: (p - p.grad).detach() for name, p in model.named_parameters()}


def test_case_1_2_14_gradients_are_those_of_the_valid_tokens() -> None:
    """1: accumulation by hand. 2: valid tokens [[9, 2], [1, 7]]. 14: one rank all masked."""
    found = run_ranks(_gradient_cases, 2)[0]
    expected = _expected(_uneven([9, 2, 1, 7]))
    for stage in (0, 1, 2, 3):
        state, _ = found[f"by hand, stage {stage}"]
        for name, tensor in expected.items():
            assert (state[name] - tensor).abs().max() < 1e-12, f"stage {stage}, {name}"
    state, masked = found["masked"]
    assert masked == 1
    for name, tensor in _expected(_uneven([10, 0])).items():
        assert (state[name] - tensor).abs().max() < 1e-12, name


def _schedule_and_formats(rank: int) -> dict[str, Any]:
    config = {"steps": 10, "lr_schedule": "linear", "optimizer": {"lr": 1.0}, "batch": {"accumulation": 2}, "zero": 1}
    engine = tw.initialize(model=transformer, config=config)
    tokens, labels = batches(1)[0]
    for _ in range(5):
        engine.train_batch({"input_ids": tokens, "labels": labels})
    lr = engine.lr
    engine.close()
    half = Awkward().to(torch.bfloat16)
    engine = tw.initialize(model=half, config={"precision": "bf16", "zero": 2})
    engine.train_batch({"input_ids": tokens, "labels": labels})
    formats = {p.dtype for p in engine.module.parameters()}
    moments = {t.dtype for name, t in engine.parts.update.optimizer.state().items() if "exp_avg" in name}
    engine.close()
    torch.manual_seed(rank)  # each rank its own values: only rank 0's may survive
    engine = tw.initialize(model=Awkward(), config={"zero": 3})
    whole = engine.full_state_dict()
    engine.close()
    torch.manual_seed(0)
    same = all(torch.equal(whole[name], t) for name, t in Awkward().state_dict().items()) if rank == 0 else True
    return {"lr": lr, "formats": formats, "moments": moments, "same": same}


def test_case_3_12_13_schedule_initial_values_and_formats() -> None:
    """3: a 10-step linear decay after 5 steps on 2 ranks. 12: init seeded by rank. 13: a bf16 model under AdamW."""
    for found in run_ranks(_schedule_and_formats, 2):
        assert found["lr"] == pytest.approx(0.5)
        assert found["same"]
        assert found["formats"] == {torch.float32}
        assert found["moments"] == {torch.float32}


def test_case_4_a_typo_ends_before_anything_starts(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trainwright.cli import main
    from trainwright.launch import run

    monkeypatch.setattr(run, "launch_local", lambda *_: pytest.fail("a process was started"))
    for typo, suggestion in (("gradient_clipp1ng=1.0", "did you mean gradient_clipping?"), ("bf16_=true", "precision: bf16")):
        assert main(["train", typo, "--nproc", "2"]) == 2
        assert suggestion in capfd.readouterr().err


def _engine_and_loader(
    rank: int, world_size: int, stage: int, data: str, global_size: int = 12
) -> tuple[Any, TokenLoader]:
    config = {
        "zero": stage, "optimizer": {"lr": 1e-2}, "lr_schedule": "cosine", "steps": 40,
        "batch": {"global_size": global_size, "micro_size": max(2, global_size // 8)}, "data": {"path": data, "sequence_length": 8}, "ema": 0.9,
    }  # fmt: skip
    engine = tw.initialize(model=lambda: transformer(vocab_size=512), config=config)
    return engine, tw.data_loader(config)


def _steps(engine: Any, loader: TokenLoader, count: int) -> list[tuple[float, list[int]]]:
    found = []
    for _ in range(count):
        batch = next(loader)
        loss = engine.train_batch(batch)
        found.append((loss, [i for i in batch.sample_ids.tolist() if i >= 0]))
    return found


def _save(rank: int, world_size: int, data: str, path: str) -> Any:
    engine, loader = _engine_and_loader(rank, world_size, 2, data)
    before = _steps(engine, loader, 4)
    engine.save(path, state={"data": loader.state_dict()})
    after = _steps(engine, loader, 4)
    loader.close()
    engine.close()
    return before + after


def _load(rank: int, world_size: int, data: str, path: str, stages: list[int]) -> Any:
    found = []
    for stage in stages:
        engine, loader = _engine_and_loader(rank, world_size, stage, data)
        loader.load_state_dict(engine.load(path)["data"])
        found.append(_steps(engine, loader, 4))
        loader.close()
        engine.close()
    with pytest.raises(CheckpointError, match="does not exist"):
        engine, loader = _engine_and_loader(rank, world_size, 0, data)
        engine.load(path + "-of-nothing")
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small token data set."""
    from trainwright.data import PrepareSettings, prepare

    folder = tmp_path_factory.mktemp("text")
    for index in range(4):
        (folder / f"{index}.txt").write_text(" ".join(f"word{(i * i + index) % 97}" for i in range(220)))
    out = folder / "tokens"
    prepare([str(folder / "*.txt")], out, PrepareSettings(vocab_size=300, held_out=0.25), progress=False)
    return str(out)


def test_case_8_a_checkpoint_loads_at_any_world_size_and_stage(data: str, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    expected = run_ranks(_save, 2, 2, data, path)
    samples = [sorted(sum((rank[step][1] for rank in expected), [])) for step in range(4, 8)]
    for world_size, stages in ((1, [3]), (3, [3, 0]), (4, [1, 2])):
        results = run_ranks(_load, world_size, world_size, data, path, stages)
        for number, stage in enumerate(stages):
            for step in range(4):
                seen = sorted(sum((rank[number][step][1] for rank in results), []))
                assert seen == samples[step], f"{world_size} ranks, stage {stage}, step {step}: other samples"
                loss = results[0][number][step][0]
                assert relative(loss, expected[0][4 + step][0]) < 1e-5, f"{world_size} ranks, stage {stage}, step {step}"


def test_case_9_a_wrong_resume_path_is_fatal_and_lists_what_is_there(tmp_path: Path) -> None:
    from trainwright.checkpoint.resume import resolve
    from trainwright.checkpoint.retention import CheckpointFolder

    (tmp_path / "notes.txt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        resolve(CheckpointFolder(tmp_path / "checkpoints"), "must")


def test_case_11_resuming_in_epoch_2_keeps_its_own_order(data: str) -> None:
    """The exact sequence, on a second resume and with the number of ranks changed too."""

    def loader(replica: int, replicas: int) -> TokenLoader:
        split = TokenDataset.open(data).split("train")
        rows = -(-10 // replicas)
        return TokenLoader(split, 8, BatchPlan(10, rows, 1), seed=1, replica=replica, replicas=replicas, prefetch=0)

    def run(cursor: Any, replicas: int, count: int) -> tuple[list[int], Any]:
        loaders = [loader(r, replicas) for r in range(replicas)]
        if cursor is not None:
            for each in loaders:
                each.load_state_dict(cursor)
        seen = [i for _ in range(count) for each in loaders for i in next(each).sample_ids.tolist() if i >= 0]
        return seen, loaders[0].state_dict()

    epoch = loader(0, 1).num_sequences
    steps = 3 * epoch // 10 + 1
    whole, _ = run(None, 1, steps)
    assert sorted(whole[:epoch]) == list(range(epoch))
    assert whole[epoch : 2 * epoch] != whole[:epoch]
    assert sorted(whole[epoch : 2 * epoch]) == list(range(epoch))
    third = steps // 3
    first, cursor = run(None, 2, third)
    second, cursor = run(cursor, 3, third)
    rest, _ = run(cursor, 1, steps - 2 * third)
    assert first + second + rest == whole


def _uneven_world(rank: int, world_size: int, steps: int) -> Any:
    from trainwright.data.plan import plan_batches

    config = tw.load_config({"batch": {"global_size": 16, "micro_size": 4}}).config
    plan = plan_batches(config.batch, 6, world_size)
    engine = tw.initialize(model=transformer, config={"batch": {"accumulation": plan.accumulation}, "optimizer": {"lr": 1e-2}, "zero": 3})
    losses = []
    for tokens, labels in batches(steps, rows=16):
        first, last = plan.row_range(rank, world_size)
        x = torch.zeros(plan.rows, tokens.shape[1], dtype=torch.long)
        y = torch.full_like(x, -100)
        x[: last - first], y[: last - first] = tokens[first:last], labels[first:last]
        losses.append(engine.train_batch({"input_ids": x, "labels": y}))
    engine.close()
    return losses, plan.padded_rows(world_size)


def test_a_global_batch_that_does_not_divide_trains_the_same_model() -> None:
    losses, waste = run_ranks(_uneven_world, 3, 3, 5)[0]
    expected, _, _ = plain_loop(with_values(transformer), batches(5, rows=16), clip=None)
    assert waste == 2  # 16 rows on 3 ranks: 6 each
    for step, (a, b) in enumerate(zip(losses, expected, strict=True)):
        assert relative(a, b) < 1e-5, step


def _shares(rank: int, world_size: int) -> int:
    return len(share(torch.zeros(12, 2), rank, world_size))


def test_the_helper_returns_results_in_rank_order_and_the_first_traceback() -> None:
    assert run_ranks(_shares, 2, 2) == [6, 6]
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_ranks(_shares, 2, 0)


def _uneven_ends(rank: int) -> dict[str, Any]:
    """Three batches on rank 0, two on rank 1."""
    found: dict[str, Any] = {}
    mine = batches(3 if rank == 0 else 2, rows=2, seed=rank)
    for uneven in ("stop", "pad"):
        engine = tw.initialize(model=transformer, config={"precision": "fp64", "optimizer": SGD, "zero": 2})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dicts = ({"input_ids": x, "labels": y} for x, y in mine)
            losses = [engine.train_batch(batch) for batch in tw.even(dicts, uneven)]  # type: ignore[arg-type]
        found[uneven] = losses, [str(w.message) for w in told if "no batch" in str(w.message)], engine.full_state_dict()
        engine.close()
    with pytest.raises(DataError, match="rank 1 has no batch at step 3"):
        list(tw.even(mine, "error"))
    return found


def test_case_7_loaders_of_different_lengths_stop_pad_or_tell() -> None:
    ranks = run_ranks(_uneven_ends, 2)
    for found in ranks:
        assert len(found["stop"][0]) == 2
        assert len(found["pad"][0]) == 3
    assert "rank 1 has no batch at step 3: all end there" in ranks[0]["stop"][1][0]
    assert not ranks[1]["stop"][1]
    # The padded rank adds nothing: the third step is that of rank 0's batch alone.
    model = with_values(transformer).double()
    all_rows = [batches(3, rows=2, seed=0), batches(2, rows=2, seed=1)]
    for number in range(3):
        rows = [rank[number] for rank in all_rows if number < len(rank)]
        tokens, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
        mean_loss(model(tokens, labels=labels)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
                parameter.grad = None
    for name, tensor in model.state_dict().items():
        assert (ranks[0]["pad"][2][name] - tensor).abs().max() < 1e-12, name


def _sixty_four(rank: int, world_size: int, data: str, path: str, part: str) -> Any:
    """part: first (4 steps, saved), rest (4 more after loading) or whole (8 from a fresh start)."""
    engine, loader = _engine_and_loader(rank, world_size, 2, data, global_size=64)
    if part == "rest":
        loader.load_state_dict(engine.load(path)["data"])
    found = _steps(engine, loader, 8 if part == "whole" else 4)
    if part == "first":
        engine.save(path, state={"data": loader.state_dict()})
    padded = loader.plan.padded_rows(world_size)
    loader.close()
    engine.close()
    return found, padded


def test_64_sequences_a_step_on_4_ranks_go_on_on_3_and_start_on_3(data: str, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    first = run_ranks(_sixty_four, 4, 4, data, path, "first")
    rest = run_ranks(_sixty_four, 3, 3, data, path, "rest")
    fresh = run_ranks(_sixty_four, 3, 3, data, path, "whole")
    whole = run_ranks(_sixty_four, 4, 4, data, path, "whole")
    assert (whole[0][1], fresh[0][1]) == (0, 8)  # 64 rows on 3 ranks: 22 at most, in 3 micro-batches of 8

    def seen(results: list[Any], step: int) -> list[int]:
        return sorted(sum((rank[0][step][1] for rank in results), []))

    for step in range(8):
        expected, loss = seen(whole, step), whole[0][0][step][0]
        assert len(expected) == 64
        resumed = (first, step) if step < 4 else (rest, step - 4)
        for results, at in (resumed, (fresh, step)):
            assert seen(results, at) == expected, step
            assert relative(results[0][0][at][0], loss) < 1e-5, step
