"""Checkpoints over ranks: any layout to any other, one verdict on damage, kills midway, saves in the background.

Sub-groups of one spawn stand for the world sizes: a save over ranks {0, 1} is what a world of two does.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import RankFailure, run_ranks
from trainwright.checkpoint import folder as folders
from trainwright.checkpoint import save as save_module
from trainwright.checkpoint.async_save import AsyncSaver
from trainwright.checkpoint.load import load, load_weights, read_manifest, verify
from trainwright.checkpoint.manifest import MANIFEST_NAME
from trainwright.checkpoint.resume import resolve
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.checkpoint.save import CheckpointContent, save
from trainwright.errors import CheckpointError

# Rows that divide, that do not, fewer than ranks (empty shards), one, none.
SHAPES = {"even": (8, 3), "uneven": (7, 2, 2), "short": (2, 5), "row": (1,), "none": (0, 4), "wide": (5, 1)}


def reference() -> dict[str, torch.Tensor]:
    """The whole tensors, equal on all ranks."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors |= {f"optimizer.{name}.exp_avg": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["model.bf16"] = torch.randn(9, 2, generator=generator).bfloat16()
    return tensors


REPLICATED = {"model.buffer": torch.arange(6), "optimizer.even.step": torch.tensor(7.0)}
SCALARS = {"step": 7, "tokens": 1024, "state": {"cursor": [1, 2]}}


class Layout:
    """A mesh over the first ranks: (2,), (2, 2) replicate x shard, (4, 1)."""

    def __init__(self, *shape: int) -> None:
        ranks = torch.arange(torch.tensor(shape).prod().item()).reshape(shape)
        names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
        self.mesh = DeviceMesh("cpu", ranks, mesh_dim_names=names)
        self.group = dist.new_group(ranks.flatten().tolist())
        self.here = dist.get_rank() < ranks.numel()
        self.placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
        self.name = "x".join(map(str, shape))

    def shard(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: distribute_tensor(tensor, self.mesh, self.placements, src_data_rank=None)
            for name, tensor in tensors.items()
        }

    def content(self) -> CheckpointContent:
        return CheckpointContent(self.shard(reference()) | REPLICATED, SCALARS, {"model.tied": "model.even"})

    def blank(self) -> dict[str, torch.Tensor]:
        zeros = {name: torch.full_like(tensor, -1.0) for name, tensor in reference().items()}
        return self.shard(zeros) | {name: torch.zeros_like(tensor) for name, tensor in REPLICATED.items()}


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def assert_loaded(tensors: dict[str, torch.Tensor]) -> None:
    expected = reference() | REPLICATED
    for name, tensor in whole(tensors).items():
        assert torch.equal(tensor, expected[name]), name


def layouts_main(rank: int, folder: str) -> None:
    torch.manual_seed(rank)
    layouts = [Layout(*shape) for shape in ((1,), (2,), (3,), (4,), (2, 2), (4, 1))]
    by_name = {layout.name: layout for layout in layouts}
    saved = ["2", "3", "2x2", "4x1"]
    for name in saved:
        layout = by_name[name]
        if layout.here:
            save(Path(folder, name), layout.content(), layout.group)
        dist.barrier()
    for name, layout in itertools.product(saved, layouts):
        if layout.here:
            target = layout.blank()
            assert load(Path(folder, name), target, group=layout.group) == SCALARS
            assert_loaded(target)
    dist.barrier()
    weights = by_name["4"].blank()
    load_weights(Path(folder, "2"), weights)
    assert_loaded({name: tensor for name, tensor in weights.items() if name.startswith("model.")})
    assert not weights["optimizer.even.step"].any()
    check_asynchronous(by_name["4"], folder)
    check_fully_shard(folder)


def check_asynchronous(layout: Layout, folder: str) -> None:
    """The same bytes as a synchronous save, while training goes on changing the weights and using its own group."""
    save(Path(folder, "sync"), layout.content())
    saver = AsyncSaver()
    for name in ("async-1", "async-2"):
        content = layout.content()
        saver.save(Path(folder, name), content)
        for _ in range(20):
            for tensor in content.tensors.values():
                if isinstance(tensor, DTensor):
                    tensor.to_local().fill_(-5)
            dist.all_reduce(torch.ones(10))
    saver.close()
    files = sorted(path.name for path in Path(folder, "sync").iterdir())
    assert files == [MANIFEST_NAME, *(f"rank-0000{i}.safetensors" for i in range(4))]
    manifest = read_manifest(Path(folder, "sync"))
    for name in ("async-1", "async-2"):
        assert sorted(path.name for path in Path(folder, name).iterdir()) == files
        other = verify(Path(folder, name))
        assert other.model_copy(update={"created": manifest.created}) == manifest
    target = layout.blank()
    load(Path(folder, "async-2"), target)
    assert_loaded(target)


def check_fully_shard(folder: str) -> None:
    """FSDP2's own parameters and Adam's states over them, saved hybrid, loaded on one shard axis and unsharded."""

    def build(mesh: DeviceMesh | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        if mesh is not None:
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            found |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        return found

    hybrid = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("replicate", "shard"))
    flat = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("shard",))
    source = tensors_of(*build(hybrid))
    expected = {name: tensor.clone() for name, tensor in whole(source).items()}
    save(Path(folder, "fsdp"), CheckpointContent(source, {"step": 1}))
    for mesh in (flat, None):
        target = tensors_of(*build(mesh))
        with torch.no_grad():
            for tensor in target.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        load(Path(folder, "fsdp"), target)
        for name, tensor in whole(target).items():
            assert torch.equal(tensor, expected[name]), name


def test_any_layout_loads_into_any_other_bitwise(tmp_path: Path) -> None:
    run_ranks(layouts_main, 4, str(tmp_path))
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
    # Hybrid replicas share the writing and nothing is written twice.
    manifest = read_manifest(tmp_path / "2x2")
    tensor_bytes = sum(entry.size_bytes for entry in manifest.tensors.values())
    assert len(manifest.files) == 4
    assert manifest.size_bytes < tensor_bytes + 4 * 4096
    data = {path.suffix for path in (tmp_path / "2x2").iterdir()}
    assert data == {".json", ".safetensors"}  # no pickled metadata
    # What an unsharded process sees, without any group.
    target = {name: torch.zeros_like(tensor) for name, tensor in (reference() | REPLICATED).items()}
    load(tmp_path / "3", target)
    assert_loaded(target)


def error_of(action: Any) -> str:
    """The CheckpointError that `action` raises, after making sure that all ranks got the same."""
    try:
        action()
    except CheckpointError as error:
        said = str(error)
    else:
        said = "no error"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    assert everyone == [said] * len(everyone), everyone
    assert said != "no error"
    return said


def damage(path: Path, kind: str) -> None:
    shard = path / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if kind == "truncated":
        os.truncate(shard, len(data) - 3)
    elif kind == "flipped":
        data[-1] ^= 1
        shard.write_bytes(data)
    elif kind == "deleted":
        shard.unlink()
    elif kind == "no manifest":
        (path / MANIFEST_NAME).unlink()
    else:
        text = (path / MANIFEST_NAME).read_text()
        (path / MANIFEST_NAME).write_text(text.replace('"step":7', '"step":8'))


DAMAGES = {
    "truncated": r"rank-00001.safetensors has [\d,]+ of [\d,]+ bytes",
    "flipped": "rank-00001.safetensors does not match its SHA-256",
    "deleted": "rank-00001.safetensors is missing",
    "no manifest": "has no manifest.json; found in it: rank-00000.safetensors",
    "manifest changed": "does not match its seal",
}


def failures_main(rank: int, folder: str) -> dict[str, str]:
    layout = Layout(3)
    said = {}
    for kind in DAMAGES:
        path = Path(folder, kind, "step-00000007")
        save(path, layout.content())
        if rank == 0:
            damage(path, kind)
        dist.barrier()
        target = layout.blank()
        said[kind] = error_of(lambda path=path, target=target: load(path, target))
        for name, tensor in layout.blank().items():  # untouched
            assert torch.equal(whole({name: tensor})[name], whole(target)[name]), name
        dist.barrier()
    run = CheckpointFolder(Path(folder, "run"))
    save(run.path_of(7), layout.content())
    said |= failing_saves(rank, layout, run)
    said |= failing_loads(rank, layout, run.path_of(7))
    target = layout.blank()
    load(run.path_of(7), target)
    assert_loaded(target)
    dist.barrier()
    if rank == 0:
        assert [path.name for path in run.folder.iterdir()] == ["step-00000007"]
        save_of_a_killed_run = folders.temporary_path(run.path_of(9), "writing")
        save_of_a_killed_run.mkdir()
    dist.barrier()
    found = resolve(run, "auto")
    assert found is not None
    assert found.path == run.path_of(7)
    fallback = CheckpointFolder(Path(folder, "flipped"))
    save(fallback.path_of(8), layout.content())
    save(fallback.path_of(9), layout.content())
    if rank == 0:
        damage(fallback.path_of(9), "flipped")
    dist.barrier()
    found = resolve(fallback, "must")
    assert found is not None
    assert found.path == fallback.path_of(8)
    assert len(found.passed_over) == 1
    said["fallback"] = found.passed_over[0]
    return said


def failing_saves(rank: int, layout: Layout, run: CheckpointFolder) -> dict[str, str]:
    """A save that fails on one rank fails on all, and leaves nothing behind."""
    said = {}
    write = save_module.write_shard_file

    def full_disk(path: Path, chunks: Any) -> Any:
        if rank == 1:
            write(path, chunks[: len(chunks) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, chunks)

    save_module.write_shard_file = full_disk
    try:
        said["disk full"] = error_of(lambda: save(run.path_of(8), layout.content()))
        saver = AsyncSaver()
        saver.save(run.path_of(8), layout.content())
        said["disk full, asynchronous"] = error_of(saver.wait)
        saver.save(run.path_of(7), layout.content())  # would replace one that is whole
        said["disk full, on close"] = error_of(saver.close)
    finally:
        save_module.write_shard_file = write
    content = layout.content()
    uneven = CheckpointContent(content.tensors, {"step": 7 + rank})
    said["steps"] = error_of(lambda: save(run.path_of(8), uneven))
    bad = CheckpointContent(content.tensors, {"step": 8} | ({"state": object()} if rank == 2 else {}))
    said["not JSON"] = error_of(lambda: save(run.path_of(8), bad))
    gap = {name: t for name, t in content.tensors.items() if rank != 1 or name != "model.even"}
    said["gap"] = error_of(lambda: save(run.path_of(8), CheckpointContent(gap, {"step": 8})))
    return said


def failing_loads(rank: int, layout: Layout, path: Path) -> dict[str, str]:
    said = {}
    target = layout.blank()
    extra = {"model.extra": torch.zeros(1)} if rank == 1 else {}  # as under pipeline parallelism: one rank names it
    said["missing"] = error_of(lambda: load(path, target | extra))
    said["shape"] = error_of(lambda: load(path, target | {"model.buffer": torch.zeros(5 + rank, dtype=torch.int64)}))
    said["nowhere"] = error_of(lambda: load(path.with_name("step-00000099"), target))
    assert float(whole(target)["model.even"].max()) == -1
    # Names that are spread over the ranks are taken together.
    mine = {name: tensor for i, (name, tensor) in enumerate(REPLICATED.items()) if i == rank % 2}
    blank = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
    rest = {name: tensor for name, tensor in target.items() if name not in REPLICATED}
    load(path, rest | blank)
    assert_loaded(blank)
    return said


def test_failures_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    said = run_ranks(failures_main, 3, str(tmp_path))[0]
    expected = DAMAGES | {
        "disk full": "rank 1: cannot write step-00000008/rank-00001.safetensors: .*No space left",
        "disk full, asynchronous": "rank 1: cannot write step-00000008/rank-00001.safetensors: .*No space left",
        "disk full, on close": "rank 1: cannot write step-00000007/rank-00001.safetensors: .*No space left",
        "steps": "different steps: 7, 8, 9",
        "not JSON": "rank 2: scalars.state is a builtins.object",
        "gap": "do not make whole tensors",
        "missing": "not in the checkpoint: model.extra",
        "shape": r"rank 0: .*model.buffer is \[6\] in the checkpoint, \[5\] here|model.buffer is \[6\]",
        "nowhere": r"step-00000099 does not exist[\s\S]*step-00000007",
        "fallback": "step-00000009 is damaged: rank-00001.safetensors does not match",
    }
    assert said.keys() == expected.keys()
    for kind, pattern in expected.items():
        with pytest.raises(CheckpointError, match=pattern):
            raise CheckpointError(said[kind])


def killed_main(rank: int, folder: str, victim: int, point: str, step: int) -> None:
    layout = Layout(2)
    run = CheckpointFolder(folder)
    save(run.path_of(7), layout.content())
    dist.barrier()

    def kill(reached: str) -> None:
        if reached == point and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    folders.reached = kill
    write = save_module.write_shard_file

    def half_written(path: Path, chunks: Any) -> Any:
        entry = write(path, chunks)
        if point == "half written":
            os.truncate(path, entry.size_bytes // 2)
            kill(point)
        return entry

    save_module.write_shard_file = half_written
    save(run.path_of(step), layout.content())


@pytest.mark.parametrize(
    ("victim", "point", "step"),
    [
        (1, "half written", 8),
        (0, "manifest written", 8),
        (0, "old moved aside", 7),
    ],
)
def test_a_kill_midway_leaves_a_whole_checkpoint(tmp_path: Path, victim: int, point: str, step: int) -> None:
    with pytest.raises(RankFailure):
        run_ranks(killed_main, 2, str(tmp_path), victim, point, step)
    run = CheckpointFolder(tmp_path)
    found = resolve(run, "must")
    assert found is not None
    assert found.path == run.path_of(7)
    target = {name: torch.zeros_like(tensor) for name, tensor in (reference() | REPLICATED).items()}
    load(found.path, target)
    assert_loaded(target)
    assert {path.name for path in tmp_path.iterdir()} == {run.path_of(7).name}
