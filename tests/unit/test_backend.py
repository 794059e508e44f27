"""The choice of the collectives' library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainwright import distributed
from trainwright.cli import main
from trainwright.errors import LaunchError
from trainwright.launcher_variables import Launch

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA has NCCL")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    distributed.shutdown()


@without_cuda
def test_nccl_without_cuda_is_refused_with_what_works() -> None:
    with pytest.raises(LaunchError) as refused:
        distributed.start("nccl")
    got, rule, remedy = str(refused.value).splitlines()
    assert got.startswith("parallel.backend=nccl, but ")
    assert "CUDA" in rule
    assert "parallel.backend=gloo" in remedy
    assert not dist.is_initialized()


@without_cuda
def test_the_command_line_says_it_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").touch()
    overrides = ["model.preset=llama-1m", f"data.path={tmp_path}", "steps=2", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *overrides, "parallel.backend=nccl"]) == 2
    error = capfd.readouterr().err
    assert "parallel.backend=nccl" in error
    assert "remedy: parallel.backend=gloo" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_the_others_start_anywhere(backend: str) -> None:
    world = distributed.start(backend)
    assert "gloo" in world.backend
    assert world.device.type == ("cuda" if backend == "auto" and torch.cuda.is_available() else "cpu")


def test_an_unknown_backend_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "parallel.backend=mpi", "--print-config"]) == 2
    error = capfd.readouterr().err
    assert "parallel.backend" in error
    assert "nccl" in error
    assert "gloo" in error


def test_a_gpu_that_slurm_gives_to_a_task_alone_is_its_number_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    task = Launch(3, 8, 3, 4, "node0", 20000, "slurm")
    assert not distributed._has_its_own(task, 1)  # one GPU for all tasks of the machine: that is refused
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert distributed._has_its_own(task, 1)
    assert not distributed._has_its_own(task, 4)
    assert not distributed._has_its_own(Launch(3, 8, 3, 4, "node0", 20000, "torchrun"), 1)
