"""Checkpoints over ranks and an S3 server: any world size to any other, machines that share no folder, cuts and kills."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from object_server import CuttingProxy, forget_connections
from ranks import RankFailure, run_ranks
from trainwright.checkpoint.async_save import AsyncSaver
from trainwright.checkpoint.load import load
from trainwright.checkpoint.manifest import MANIFEST_NAME
from trainwright.checkpoint.resume import Remote, resolve
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.checkpoint.save import CheckpointContent, save
from trainwright.checkpoint.store import CheckpointStore
from trainwright.checkpoint.to_store import StoreWriter
from trainwright.guard import shared_folder
from trainwright.guard.shared_folder import Sites, sites_of
from trainwright.storage.objects import ObjectStore, Retry

QUICK = Retry(attempts=3, first_wait_s=0.01)
ROWS = 200_000  # 1.6 MB in all: an upload has a middle


def tensors(step: int) -> dict[str, torch.Tensor]:
    weight = torch.arange(ROWS * 2, dtype=torch.float32).reshape(ROWS, 2) * step
    return {"model.weight": weight, "optimizer.weight.exp_avg": weight + 1}


def sharded(step: int, group_ranks: list[int]) -> dict[str, torch.Tensor]:
    mesh = DeviceMesh("cpu", group_ranks)
    return {name: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for name, t in tensors(step).items()}


def content(step: int, group_ranks: list[int]) -> CheckpointContent:
    return CheckpointContent(sharded(step, group_ranks), {"step": step})


def check_loaded(path: Path, step: int, group_ranks: list[int], group: dist.ProcessGroup | None) -> None:
    target = sharded(0, group_ranks)
    assert load(path, target, group=group)["step"] == step
    for name, expected in tensors(step).items():
        tensor = target[name]
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), expected), name


def sizes_main(rank: int, folder: str, url: str) -> None:
    two = dist.new_group([0, 1])
    both, all_ranks = [0, 1], [0, 1, 2]
    store = CheckpointStore(url, retry=QUICK)
    run = CheckpointFolder(Path(folder, "shared"))
    if rank < 2:
        saver = AsyncSaver(two, writer=StoreWriter(store, shared=True))
        for step in (1, 2):
            saver.save(run.path_of(step), content(step, both))
        saver.close()
    dist.barrier()
    # Three ranks, on machines that have never seen it, two of which share a disk.
    own = CheckpointFolder(Path(folder, f"disk-{min(rank, 1)}"))
    own.folder.mkdir(exist_ok=True)
    sites = Sites((0, 1, 1))
    point = resolve(own, "must", remote=Remote(store, sites))
    assert point is not None
    assert point.path == own.path_of(2)
    check_loaded(point.path, 2, all_ranks, None)
    # They go on: nothing whole lies on any of their disks, all of it on the store.
    save(own.path_of(3), content(3, all_ranks), writer=StoreWriter(store, shared=False))
    assert not own.path_of(3).exists()
    assert [path.name for path in own.folder.iterdir()] == ["step-00000002"]
    dist.barrier()
    if rank == 0:
        assert [str(checkpoint) for checkpoint in store.list()] == [f"step-0000000{step}" for step in (1, 2, 3)]
        assert len(store.objects.sizes("step-00000003")) == 4
    if rank < 2:
        point = resolve(run, "auto", group=two, remote=Remote(store, Sites.alone(2)))
        assert point is not None
        assert (point.path, point.manifest.world_size) == (run.path_of(3), 3)
        check_loaded(point.path, 3, both, two)
    dist.barrier()
    found = sites_of(Path(folder, "shared"))
    assert found == Sites((0, 0, 0))
    shared_folder.PATIENCE_S = 1.0
    # A folder of this machine alone: rank 2 looks at another one of the same name.
    assert sites_of(Path(folder, "near" if rank < 2 else "far")).of_rank == (0, 0, 2)


def test_any_world_size_and_machines_without_a_shared_folder(s3: str, tmp_path: Path) -> None:
    run_ranks(sizes_main, 3, str(tmp_path), s3)


def faulty_main(rank: int, folder: str, url: str, fault: str) -> None:
    run, store = CheckpointFolder(Path(folder)), CheckpointStore(url, retry=QUICK)
    writer = StoreWriter(store, shared=fault != "kill straight")
    if rank == 1 and fault.startswith("kill"):
        upload = store.objects._filesystem.put_file

        def half(source: str, target: str, **options: object) -> None:
            """Half of the file lies on the store when the process ends."""
            Path(source + ".half").write_bytes(Path(source).read_bytes()[:400_000])
            upload(source + ".half", target)
            os.kill(os.getpid(), signal.SIGKILL)

        store.objects._filesystem.put_file = half
    store.objects._filesystem.retries = 1
    save(run.path_of(2), content(2, [0, 1]), writer=writer)
    assert writer.problem, "the cut was not noticed"


@pytest.mark.parametrize("fault", ["kill", "kill straight", "cut"])
def test_no_half_checkpoint_is_ever_taken_for_whole(
    fault: str, s3: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(s3)
    run = CheckpointFolder(tmp_path / "run")
    save(run.path_of(1), content_alone(1), writer=StoreWriter(store, shared=True))
    if fault == "cut":
        proxy = CuttingProxy(s3_port, after_bytes=500_000)
        proxy.cuts_left = 1_000
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            run_ranks(faulty_main, 2, str(run.folder), s3, fault)
        proxy.close()
        assert proxy.cuts > 0
    else:
        with pytest.raises(RankFailure):
            run_ranks(faulty_main, 2, str(run.folder), s3, fault)
    forget_connections()
    if fault.startswith("kill"):
        assert ObjectStore(s3).sizes("step-00000002")["step-00000002/rank-00001.safetensors"] == 400_000
    assert f"step-00000002/{MANIFEST_NAME}" not in ObjectStore(s3).sizes()
    assert [str(checkpoint) for checkpoint in store.list()] == ["step-00000001"]
    # Another machine goes on from the last whole one, and nothing of the half is left.
    elsewhere = CheckpointFolder(tmp_path / "elsewhere")
    point = resolve(elsewhere, "must", remote=Remote(store, Sites.alone()))
    assert point is not None
    assert (point.manifest.step, point.passed_over) == (1, ())
    assert not ObjectStore(s3).sizes("step-00000002")
    # The machine itself has a newer one on its disk where that was committed before the upload.
    here = resolve(run, "must", remote=Remote(store, Sites.alone()))
    assert here is not None
    assert here.manifest.step == (1 if fault == "kill straight" else 2)


def content_alone(step: int) -> CheckpointContent:
    return CheckpointContent(tensors(step), {"step": step})
