"""A checkpoint under random damage: all ranks refuse it together, naming the file, or load exactly what was saved."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import trainwright as tw
from ranks import run_ranks
from small import batches, transformer
from trainwright.checkpoint.resume import resolve
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.errors import CheckpointError

CORRUPTIONS = 200
CONFIG = {"zero": 2, "optimizer": {"lr": 1e-2}, "ema": 0.9}


def _save_two(folder: str) -> Any:
    """Checkpoints of steps 1 and 2 in a run's folder; the engine's whole state at 2."""
    engine = tw.initialize(model=transformer, config=CONFIG)
    tokens, labels = batches(1, rows=4)[0]
    for step in (1, 2):
        engine.train_batch({"input_ids": tokens, "labels": labels})
        engine.save(f"{folder}/step-{step:08d}", state={"note": step})
    return engine


def _content(engine: Any) -> dict[str, torch.Tensor]:
    from trainwright.snapshot import content_of

    tensors = content_of(engine, {}).tensors
    return {name: (t.to_local() if hasattr(t, "to_local") else t).clone() for name, t in tensors.items()}


def corrupt(folder: Path, other: Path, rng: random.Random) -> tuple[str, str]:
    """Damages one thing of the checkpoint `folder`; (what was done, the file's name)."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    kind = rng.choice(
        [
            "flip",
            "flip",
            "flip",
            "header",
            "truncate",
            "delete",
            "append",
            "swap",
            "older",
            "zero",
            "empty",
            "link",
            "folder",
        ]
    )
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "header":  # where safetensors keeps sizes and offsets, and a manifest its version
        data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
        path.write_bytes(data)
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "append":
        path.write_bytes(data + os.urandom(rng.randrange(1, 64)))
    elif kind == "zero":
        start = rng.randrange(len(data))
        data[start : start + 512] = bytes(len(data[start : start + 512]))
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "older":
        shutil.copyfile(other / path.name, path)
    elif kind == "swap":
        shards = [file for file in files if file.suffix == ".safetensors"]
        a, b = rng.sample(shards, 2)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        path = a
    else:
        path.unlink()
        if kind == "link":
            path.symlink_to("/etc/passwd")
        elif kind == "folder":
            path.mkdir()
    return kind, path.name


def _attack(rank: int, folder: str) -> dict[str, Any]:
    engine = _save_two(f"{folder}/good")
    good, older = Path(folder) / "good" / "step-00000002", Path(folder) / "good" / "step-00000001"
    expected = _content(engine)
    rng = random.Random(7)
    counts: dict[str, int] = {}
    wrong: list[str] = []
    for number in range(CORRUPTIONS):
        target = Path(folder) / f"bad-{number}"
        if rank == 0:
            shutil.copytree(good, target)
        dist.barrier()
        box = [corrupt(target, older, rng) if rank == 0 else ("", "")]
        dist.broadcast_object_list(box, src=0)
        kind, name = box[0]
        same = rank == 0 and all(
            (target / f.name).is_file() and (target / f.name).read_bytes() == f.read_bytes() for f in good.iterdir()
        )
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.to_local().fill_(float("nan"))
        outcome = ""
        try:
            state_found = engine.load(target)
            found = _content(engine)
            loaded = state_found == {"note": 2} and all(torch.equal(found[n], t) for n, t in expected.items())
            outcome = "loaded" if loaded else "WRONG"
        except CheckpointError as error:
            # Of files exchanged for each other, and a manifest for an older one, the first that does not match is named.
            named = name in str(error) or (kind in ("swap", "older") and ".safetensors" in str(error))
            outcome = "refused" if named else f"NAMELESS {error}"
        outcomes: list[Any] = [None, None]
        dist.all_gather_object(outcomes, (outcome, same))
        told = {o for o, _ in outcomes}
        if len(told) > 1 or outcome not in ("loaded", "refused") or (outcome == "loaded" and not outcomes[0][1]):
            wrong.append(f"{number}: {kind} of {name}: {outcomes}")
        counts[f"{kind}: {outcome}"] = counts.get(f"{kind}: {outcome}", 0) + 1
        if rank == 0:
            shutil.rmtree(target)
    engine.load(good)
    assert all(torch.equal(found, expected[name]) for name, found in _content(engine).items())
    engine.close()
    return {"counts": counts, "wrong": wrong}


def test_200_corruptions_none_loads_silently_wrong(tmp_path: Path) -> None:
    for found in run_ranks(_attack, 2, str(tmp_path)):
        assert not found["wrong"], found["counts"]
        assert sum(found["counts"].values()) == CORRUPTIONS
        assert sum(n for what, n in found["counts"].items() if "refused" in what) > 0.9 * CORRUPTIONS


def _fall_back(rank: int, folder: str) -> list[Any]:
    engine = _save_two(folder)
    newest = Path(folder) / "step-00000002"
    results = []
    for damage in ("truncate", "delete"):
        victim = sorted(newest.glob("*.safetensors"))[1]  # rank 1's
        kept = victim.read_bytes()
        dist.barrier()
        if rank == 0:
            victim.write_bytes(kept[:-100]) if damage == "truncate" else victim.unlink()
        dist.barrier()
        try:
            engine.load(newest)
        except CheckpointError as error:
            results.append(str(error))
        point = resolve(CheckpointFolder(folder), "auto")
        assert point is not None
        results.append((point.path.name, point.passed_over))
        results.append(engine.load(point.path))
        dist.barrier()
        if rank == 0:
            victim.write_bytes(kept)
        dist.barrier()
    engine.close()
    return results


def test_case_10_a_truncated_or_deleted_shard_of_rank_1(tmp_path: Path) -> None:
    """All ranks refuse together, name the file, and fall back to the last whole checkpoint."""
    ranks = run_ranks(_fall_back, 2, str(tmp_path))
    assert ranks[0] == ranks[1]
    for number, damage in enumerate(("truncated", "deleted")):
        error, (name, passed_over), state = ranks[0][3 * number : 3 * number + 3]
        assert ".safetensors" in error, damage
        assert name == "step-00000001"
        assert "step-00000002" in passed_over[0]
        assert ".safetensors" in passed_over[0]
        assert state == {"note": 1}
