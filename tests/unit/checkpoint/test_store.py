"""Checkpoints on an object store, one process: what commits, what is resumed from, what goes, what a failure leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.checkpoint.agreement import Ranks
from trainwright.checkpoint.load import load_weights
from trainwright.checkpoint.manifest import MANIFEST_NAME
from trainwright.checkpoint.resume import Remote, resolve
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.checkpoint.save import CheckpointContent, save
from trainwright.checkpoint.store import BEST, CheckpointStore
from trainwright.checkpoint.to_store import StoreWriter
from trainwright.errors import CheckpointError
from trainwright.guard.shared_folder import Sites
from trainwright.storage.objects import Retry

SHARD = "rank-00000.safetensors"


class Run:
    """A run's folder and its store."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = CheckpointFolder(folder)
        self.store = CheckpointStore(url, retry=Retry(attempts=2, first_wait_s=0.001))
        self.remote = Remote(self.store, Sites.alone())
        self.writer = StoreWriter(self.store, shared=True)

    def save(self, *steps: int) -> None:
        for step in steps:
            weight = torch.full((3, 2), float(step))
            save(
                self.folder.path_of(step),
                CheckpointContent({"model.weight": weight}, {"step": step}),
                writer=self.writer,
            )

    def names(self) -> list[str]:
        return [str(checkpoint) for checkpoint in self.store.list()]

    def weight(self, step: int) -> float:
        target = {"model.weight": torch.zeros(3, 2)}
        load_weights(self.folder.path_of(step), target)
        return float(target["model.weight"][0, 0])


@pytest.fixture(params=["memory", "file"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    urls = {"memory": f"memory://{tmp_path.name}/run", "file": f"file://{tmp_path}/store"}
    return Run(tmp_path / "checkpoints", urls[request.param])


def test_a_save_is_in_both_places_and_a_resume_elsewhere_takes_the_stores(run: Run, tmp_path: Path) -> None:
    run.save(1, 2)
    assert run.names() == ["step-00000001", "step-00000002"]
    assert run.store.manifest("step-00000002") == resolve(run.folder, "must").manifest  # type: ignore[union-attr]
    elsewhere = Run(tmp_path / "other" / "checkpoints", run.store.url)
    point = resolve(elsewhere.folder, "must", remote=elsewhere.remote)
    assert point is not None
    assert (point.path, point.manifest.step) == (elsewhere.folder.path_of(2), 2)
    assert elsewhere.weight(2) == 2.0
    assert [path.name for path in elsewhere.folder.folder.iterdir()] == ["step-00000002"]


def test_the_newest_of_both_places_counts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Run(tmp_path / "other" / "checkpoints", run.store.url)
    run.save(1)
    assert resolve(other.folder, "auto", remote=other.remote).manifest.step == 1  # type: ignore[union-attr]
    run.save(2)
    assert resolve(other.folder, "auto", remote=other.remote).manifest.step == 2  # type: ignore[union-attr]
    save(other.folder.path_of(3), CheckpointContent({"model.weight": torch.zeros(3, 2)}, {"step": 3}))
    # What lies in both is taken from the folder: nothing is downloaded.
    monkeypatch.setattr(other.store.objects, "download", lambda *_: pytest.fail("downloaded"))
    assert resolve(other.folder, "auto", remote=other.remote).manifest.step == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("harm", ["cut", "altered", "deleted", "manifest altered", "manifest deleted"])
def test_a_harmed_object_is_named_and_the_one_before_is_taken(run: Run, tmp_path: Path, harm: str) -> None:
    run.save(1, 2)
    objects, shard, manifest = run.store.objects, f"step-00000002/{SHARD}", f"step-00000002/{MANIFEST_NAME}"
    data = objects.read_bytes(shard, 10_000)
    text = objects.read_bytes(manifest, 10_000)
    assert data is not None
    assert text is not None
    if harm == "cut":
        objects.write_bytes(shard, data[:-5])
    elif harm == "altered":
        objects.write_bytes(shard, data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "manifest altered":
        objects.write_bytes(manifest, text.replace(b'"step":2', b'"step":3'))
    else:
        objects.delete([shard if harm == "deleted" else manifest])
    other = Run(tmp_path / "other" / "checkpoints", run.store.url)
    point = resolve(other.folder, "must", remote=other.remote)
    assert point is not None
    assert point.manifest.step == 1
    assert other.weight(1) == 1.0
    if harm == "manifest deleted":  # then it never was one, and its objects are cleared away
        assert point.passed_over == ()
        assert [*objects.sizes("step-00000002")] == []
    else:
        named = MANIFEST_NAME if harm.startswith("manifest") else SHARD
        assert len(point.passed_over) == 1
        assert "step-00000002" in point.passed_over[0]
        assert named in point.passed_over[0]
    # The folder that has it whole goes on from its own, and needs no store for it.
    assert resolve(run.folder, "must", remote=run.remote).manifest.step == 2  # type: ignore[union-attr]


def test_a_damaged_file_of_the_folder_is_brought_back_from_the_store(run: Run) -> None:
    run.save(1, 2)
    shard = run.folder.path_of(2) / SHARD
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    point = resolve(run.folder, "auto", remote=run.remote)
    assert point is not None
    assert point.manifest.step == 2
    assert "does not match its SHA-256" in point.passed_over[0]
    assert run.weight(2) == 2.0


def test_never_and_must_look_at_the_store_too(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "other" / "checkpoints", run.store.url)
    assert resolve(other.folder, "auto", remote=other.remote) is None
    assert resolve(other.folder, "never", remote=other.remote) is None
    with pytest.raises(CheckpointError, match=f"nothing in {run.store.url}"):
        resolve(other.folder, "must", remote=other.remote)
    run.save(4)
    with pytest.raises(CheckpointError, match=f"{run.store.url} holds step-00000004"):
        resolve(other.folder, "never", remote=other.remote)


class Broken(RuntimeError):
    """What a fault raises."""


def test_a_failed_upload_leaves_no_checkpoint_is_told_and_made_up_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)

    def fail(*_: Any) -> None:
        raise Broken("the link is down")

    monkeypatch.setattr(run.store.objects._filesystem, "put_file", fail)
    run.save(2)
    assert run.names() == ["step-00000001"]
    assert "the link is down" in run.writer.problem
    assert run.writer.missing == run.folder.path_of(2)
    assert run.weight(2) == 2.0  # the run has it all the same
    with pytest.raises(CheckpointError, match="the link is down"):
        run.writer.make_up(Ranks())
    monkeypatch.undo()
    run.writer.make_up(Ranks())
    assert run.names() == ["step-00000001", "step-00000002"]
    assert (run.writer.missing, run.writer.problem) == (None, "")


def test_a_store_that_fails_while_it_is_asked_is_no_fresh_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1, 2)
    other = Run(tmp_path / "other" / "checkpoints", run.store.url)

    def fail(*_: Any, **__: Any) -> None:
        raise Broken("the link is down")

    for name in ("find", "open"):  # listing; then reading what was listed
        with monkeypatch.context() as patch:
            patch.setattr(other.store.objects._filesystem, name, fail)
            with pytest.raises(CheckpointError, match="the link is down"):
                resolve(other.folder, "auto", remote=other.remote)
    assert not other.folder.path_of(1).exists()


def test_a_run_killed_before_its_upload_makes_up_for_it_when_it_goes_on(run: Run) -> None:
    run.save(1)
    save(run.folder.path_of(2), CheckpointContent({"model.weight": torch.full((3, 2), 2.0)}, {"step": 2}))
    assert run.names() == ["step-00000001"]
    run.writer.resumed_from(run.folder.path_of(2), Ranks())
    run.writer.make_up(Ranks())
    assert run.names() == ["step-00000001", "step-00000002"]
    run.writer.resumed_from(run.folder.path_of(2), Ranks())
    assert run.writer.missing is None


def test_retention_deletes_the_manifest_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.store.keep, run.store.keep_every, run.store.protected = 2, 4, frozenset({"step-00000003"})
    deleted: list[str] = []
    delete = run.store.objects._filesystem.rm_file
    monkeypatch.setattr(run.store.objects._filesystem, "rm_file", lambda key: (deleted.append(key), delete(key)))
    run.save(1, 2, 3, 4, 5, 6)
    assert run.names() == [f"step-0000000{step}" for step in (3, 4, 5, 6)]
    of_first = [key.rsplit("/", 1)[1] for key in deleted if "step-00000001/" in key]
    assert of_first[-2:] == [MANIFEST_NAME, SHARD]
    assert not run.store.objects.sizes("step-00000001")


def test_a_kill_inside_retention_leaves_nothing_that_looks_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1, 2)
    delete = run.store.objects._filesystem.rm_file

    def killed(key: str) -> None:
        if key.endswith(SHARD):
            raise KeyboardInterrupt
        delete(key)

    monkeypatch.setattr(run.store.objects._filesystem, "rm_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run.store.remove("step-00000002")
    monkeypatch.undo()
    assert run.names() == ["step-00000001"]
    assert run.store.clean() == ("step-00000002",)
    assert not run.store.objects.sizes("step-00000002")


def test_best_is_a_checkpoint_of_its_own(run: Run, tmp_path: Path) -> None:
    run.store.keep = 1
    run.writer.as_best = True
    run.save(1)
    run.writer.as_best = False
    run.save(2, 3)
    assert run.names() == ["step-00000003"]
    best = run.store.look(BEST)
    assert best.problem is None
    assert best.manifest is not None
    assert best.manifest.step == 1


def test_a_best_that_was_not_uploaded_is_made_up_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise Broken("the link is down")

    run.writer.as_best = True
    with monkeypatch.context() as patch:
        patch.setattr(run.store.objects._filesystem, "put_file", fail)
        run.save(1)
    run.folder.keep_as_best(run.folder.path_of(1))
    run.writer.as_best = False
    run.save(2)
    best = run.store.look(BEST)
    assert best.problem is None
    assert best.manifest is not None
    assert best.manifest.step == 1
    assert run.names() == ["step-00000002"]


def test_a_file_of_the_same_name_in_the_store_is_left_alone(run: Run) -> None:
    """Only what has a checkpoint's name is ever deleted."""
    run.store.objects.write_bytes("notes.txt", b"mine")
    run.store.objects.write_bytes("step-1/rank.safetensors", b"mine")
    run.store.keep = 1
    run.save(1, 2)
    run.store.clean()
    assert {"notes.txt", "step-1/rank.safetensors"} <= run.store.objects.sizes().keys()


def test_a_full_disk_is_told_before_anything_is_downloaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    shutil.rmtree(run.folder.folder)
    monkeypatch.setattr("trainwright.storage.free_bytes", lambda path: 3)
    monkeypatch.setattr(run.store.objects, "download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match="GB free"):
        resolve(run.folder, "auto", remote=run.remote)


def test_a_save_to_a_url_is_refused_and_makes_no_folder_of_that_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="s3://bucket/x") as error:
        save("s3://bucket/x", CheckpointContent({"model.weight": torch.zeros(1)}, {"step": 1}))
    assert "checkpoint.store" in error.value.remedy
    assert sorted(tmp_path.iterdir()) == before
