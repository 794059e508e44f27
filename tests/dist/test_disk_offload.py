"""Optimizer states (and masters) in files: the run is that in memory, fits where that does not, and resumes either way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import transformer

import trainwright as tw
from trainwright.errors import ConfigError, ContradictionError
from trainwright.mapped_file import MappedFile, disk_speed, lies_in_memory

LIMITED = Path(__file__).with_name("limited_memory.py")
MEMORY: dict[str, Any] = {"zero": 3, "optimizer": {"lr": 3e-3}}


def limited(config: dict[str, Any], bytes_a_parameter: float) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(LIMITED), json.dumps(config), str(bytes_a_parameter)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is counted by Linux")
def test_trains_under_limits_that_hold_no_optimizer_states(tmp_path: Path) -> None:
    """Beyond the imports: fp32 parameters and gradients and a quarter of the states are 10 bytes a parameter; with the
    masters on disk half of that; with the bf16 weights there too the gradients alone are left, and a unit at work."""
    on_disk = {**MEMORY, "offload": {"optimizer": "disk", "path": str(tmp_path)}}
    unlimited = json.loads(limited(MEMORY, 0).stdout)
    assert "allocate memory" in limited(MEMORY, 10).stderr, "the limit does not bind"
    assert json.loads(limited(on_disk, 10).stdout) == unlimited
    on_disk = {
        **MEMORY, "precision": "bf16", "offload": {"optimizer": "disk", "masters": "disk", "path": str(tmp_path)}
    }  # fmt: skip
    assert json.loads(limited(on_disk, 5).stdout) == json.loads(limited(on_disk, 0).stdout)
    everything = {"optimizer": "disk", "masters": "disk", "parameters": "disk", "path": str(tmp_path)}
    on_disk = {**MEMORY, "precision": "bf16", "offload": everything}
    assert json.loads(limited(on_disk, 3.1).stdout) == json.loads(limited(on_disk, 0).stdout)
    assert not list(tmp_path.iterdir()), "the files have no names"


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 13, (4, 13), generator=torch.Generator().manual_seed(10 * step + rank))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


CASES: dict[str, dict[str, Any]] = {
    "moments": {"zero": 2, "offload": {"optimizer": "disk"}},
    "adam, stage 3": {"zero": 3, "offload": {"optimizer": "disk"}, "optimizer": {"name": "adam", "lr": 1e-2}},
    "in backward": {"zero": 3, "offload": {"optimizer": "disk"}, "fused": {"optimizer_in_backward": True}},
    "masters": {"zero": 3, "precision": "bf16", "offload": {"optimizer": "disk", "masters": "disk"}},
    "parameters": {"zero": 3, "offload": {"parameters": "disk"}},
    "parameters and moments": {"zero": 3, "offload": {"parameters": "disk", "optimizer": "disk"}},
    "all": {"zero": 3, "precision": "bf16", "offload": {"parameters": "disk", "optimizer": "disk", "masters": "disk"}},
}


def _engine(config: dict[str, Any]) -> tw.Engine:
    return tw.initialize(model=transformer, config={"optimizer": {"lr": 1e-2}, "seed": 3, **config})


def _equal(rank: int, folder: Path) -> dict[str, Any]:
    """Losses in memory and on disk; both go on from a checkpoint of the other."""
    found: dict[str, Any] = {}
    for name, config in CASES.items():
        config = {**config, "offload": {**config["offload"], "path": str(folder / "files")}}
        plain = {key: value for key, value in config.items() if key not in ("offload", "fused")}
        losses: dict[str, list[float]] = {}
        for kind, own in (("disk", config), ("memory", plain)):
            engine = _engine(own)
            losses[kind] = [engine.train_batch(batch(step, rank)) for step in range(4)]
            engine.save(folder / f"{name}-{kind}")
            losses[f"{kind} on"] = [engine.train_batch(batch(step, rank)) for step in range(4, 7)]
            engine.close()
        for kind, other, own in (("disk", "memory", config), ("memory", "disk", plain), ("disk", "disk", config)):
            engine = _engine(own)
            engine.load(folder / f"{name}-{other}")
            losses[f"{other} -> {kind}"] = [engine.train_batch(batch(step, rank)) for step in range(4, 7)]
            engine.close()
        found[name] = losses
    return found


def test_on_disk_and_in_memory_are_one_run_and_exchange_checkpoints(tmp_path: Path) -> None:
    for name, losses in run_ranks(_equal, 2, tmp_path)[0].items():
        # Masters on disk leave memory bf16 initial values and gradients: not bitwise those of fp32 masters.
        tolerance = 2e-2 if name in ("masters", "all") else 1e-6 if name == "in backward" else 0.0
        assert losses["disk"] == pytest.approx(losses["memory"], abs=tolerance, rel=0), name
        assert losses["disk -> disk"] == losses["disk on"], name
        assert losses["disk -> memory"] == pytest.approx(losses["disk on"], abs=tolerance, rel=0), name
        assert losses["memory -> disk"] == pytest.approx(losses["memory on"], abs=tolerance, rel=0), name
    header = json.loads((tmp_path / "masters-disk" / "manifest.json").read_text())
    kept = {t["dtype"] for n, t in header["tensors"].items() if n.startswith("model.")}
    assert kept == {"float32"}


def test_a_full_disk_is_told_before_anything_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"(?s)offload\.path.*No space left.*another offload\.path"):
        _engine({"offload": {"optimizer": "disk", "path": str(tmp_path)}})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"(?s)offload\.path.*local disk"):
        _engine({"offload": {"optimizer": "disk", "path": str(tmp_path / "file" / "folder")}})


@pytest.mark.parametrize(
    "config",
    [
        {"offload": {"masters": "disk"}, "precision": "bf16"},
        {"offload": {"optimizer": "disk", "masters": "disk"}},
        {"offload": {"optimizer": "disk"}, "optimizer": {"name": "muon"}},
        {"offload": {"optimizer": "disk"}, "precision": "fp64"},
        {"offload": {"optimizer": "disk"}, "precision": {"dtype": "bf16", "master": "bf16_kahan"}},
        {"offload": {"optimizer": "disk", "masters": "disk"}, "precision": "bf16", "ema": 0.9},
        {"offload": {"path": "/tmp"}},
        {"offload": {"parameters": "disk"}, "zero": 2},
        {"offload": {"optimizer": "disk", "masters": "disk", "parameters": "cpu"}, "precision": "bf16", "zero": 3},
    ],
)
def test_what_files_cannot_hold_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ContradictionError, match="offload"):
        _engine(config)


def test_a_model_with_values_takes_them_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    losses = []
    for offload in ({}, {"parameters": "disk", "path": str(tmp_path)}):
        model = transformer()
        model.load_state_dict({name: torch.full_like(value, 0.01) for name, value in model.state_dict().items()})
        engine = tw.initialize(model=model, config={"zero": 3, "offload": offload, "optimizer": {"lr": 1e-2}})
        losses.append([engine.train_batch(batch(step, 0)) for step in range(3)])
        engine.close()
    assert losses[0] == losses[1]


def test_the_cost_is_predicted(tmp_path: Path) -> None:
    engine = _engine({"offload": {"optimizer": "disk", "path": str(tmp_path)}})
    text = engine.parts.update.optimizer.describe()
    engine.close()
    assert "MB of moments a rank" in text
    assert "s more a step" in text


def test_a_state_file_keeps_what_was_let_go(tmp_path: Path) -> None:
    file = MappedFile(tmp_path, 100_000, 3)
    for row, values in enumerate(file.rows):
        values.copy_(torch.arange(100_000.0) + row)
    file.let_go(0, 100_000)
    file.ahead(50_000, 200_000)  # beyond the end: cut
    assert all(torch.equal(values, torch.arange(100_000.0) + row) for row, values in enumerate(file.rows))
    assert MappedFile(tmp_path, 0, 2).rows[1].numel() == 0


def test_file_systems_in_memory_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, *_: f"dev / ext4 rw\ntmpfs {tmp_path} tmpfs rw\n")
    assert lies_in_memory(tmp_path / "deeper")
    assert not lies_in_memory(tmp_path.parent)
    assert disk_speed(tmp_path)[0] > 0
