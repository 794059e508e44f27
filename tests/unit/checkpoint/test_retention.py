"""Which checkpoints stay, which is resumed from, what is found after a kill. One process, no group."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from trainwright import storage
from trainwright.checkpoint import folder as folders
from trainwright.checkpoint.async_save import AsyncSaver
from trainwright.checkpoint.load import load, load_weights, read_manifest, verify
from trainwright.checkpoint.resume import resolve
from trainwright.checkpoint.retention import CheckpointFolder
from trainwright.checkpoint.save import CheckpointContent, save
from trainwright.errors import CheckpointError, UsageError


def content(step: int, value: float | None = None) -> CheckpointContent:
    weight = torch.full((3, 2), float(step if value is None else value))
    tensors = {"model.weight": weight, "optimizer.weight.step": torch.tensor(float(step))}
    return CheckpointContent(tensors, {"step": step})


def weight_of(path: Path) -> float:
    target = {"model.weight": torch.zeros(3, 2)}
    load_weights(path, target)
    return float(target["model.weight"][0, 0])


@pytest.fixture
def run(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints")


def fill(run: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        save(run.path_of(step), content(step))


def names(run: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


def test_round_trip_and_listing(run: CheckpointFolder) -> None:
    assert run.list() == ()
    assert run.newest_whole() is None
    fill(run, 100, 200)
    assert [str(checkpoint) for checkpoint in run.list()] == ["step-00000100", "step-00000200"]
    assert run.newest_whole() == run.path_of(200)
    target = {"model.weight": torch.zeros(3, 2), "optimizer.weight.step": torch.tensor(0.0)}
    assert load(run.path_of(100), target) == {"step": 100}
    assert torch.equal(target["model.weight"], torch.full((3, 2), 100.0))
    assert target["optimizer.weight.step"] == 100


def test_keep_last_and_keep_every(run: CheckpointFolder) -> None:
    run.keep, run.keep_every = 2, 300
    fill(run, 100, 200, 300, 400, 500)
    assert run.prune() == (run.path_of(100), run.path_of(200))
    assert names(run) == ["step-00000300", "step-00000400", "step-00000500"]
    assert run.prune() == ()


def test_keep_zero_keeps_all(run: CheckpointFolder) -> None:
    fill(run, 1, 2, 3)
    assert run.prune() == ()
    assert len(run.list()) == 3


def test_prune_never_takes_the_last_whole_one(run: CheckpointFolder) -> None:
    run.keep = 1
    fill(run, 1, 2, 3)
    for step in (2, 3):
        next(run.path_of(step).glob("rank-*")).unlink()
    assert run.prune() == ()
    assert run.newest_whole() == run.path_of(1)
    assert [checkpoint.whole for checkpoint in run.list()] == [True, False, False]


def test_a_run_set_back_keeps_what_it_wrote_last(run: CheckpointFolder) -> None:
    run.keep = 2
    fill(run, 100, 200, 300)
    fill(run, 150)  # resumed from 100 by path
    run.prune()
    assert names(run) == ["step-00000150", "step-00000300"]
    assert run.newest_whole() == run.path_of(150)


def test_on_commit_prunes(run: CheckpointFolder) -> None:
    run.keep = 1
    for step in (1, 2, 3):
        save(run.path_of(step), content(step), on_commit=lambda path: run.prune() and None)
    assert names(run) == ["step-00000003"]


def test_best_outlives_its_source(run: CheckpointFolder) -> None:
    fill(run, 1, 2)
    run.keep_as_best(run.path_of(1))
    run.keep = 1
    run.prune()
    assert names(run) == ["best", "step-00000002"]
    assert weight_of(run.best) == 1
    run.keep_as_best(run.path_of(2))
    assert names(run) == ["best", "step-00000002"]
    assert weight_of(run.best) == 2
    verify(run.best)


def test_best_without_hard_links(run: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    fill(run, 1)
    run.keep_as_best(run.path_of(1))
    shutil.rmtree(run.path_of(1))
    assert weight_of(run.best) == 1


def test_best_must_be_whole(run: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest.json"):
        run.keep_as_best(run.path_of(1))


def test_a_save_replaces_a_checkpoint_but_nothing_else(run: CheckpointFolder, tmp_path: Path) -> None:
    fill(run, 1)
    save(run.path_of(1), content(1, 5.0))
    assert weight_of(run.path_of(1)) == 5
    assert names(run) == ["step-00000001"]
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"chapter.tex, not a checkpoint"):
        save(precious, content(1))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        save(precious / "chapter.tex", content(1))
    assert (precious / "chapter.tex").read_text() == "x"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", ["folder made", "shards written", "manifest written"])
def test_leftovers_of_killed_saves_are_cleaned(
    run: CheckpointFolder, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(run, 1)

    def kill(reached: str) -> None:
        if reached == point:
            raise Killed

    monkeypatch.setattr(folders, "reached", kill)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans up nothing
    with pytest.raises(Killed):
        save(run.path_of(2), content(2))
    monkeypatch.undo()
    assert len(names(run)) == 2
    assert run.newest_whole() == run.path_of(1)
    assert len(run.clean()) == 1
    assert names(run) == ["step-00000001"]


@pytest.mark.parametrize("point", ["manifest written", "old moved aside", "renamed"])
def test_a_replacement_killed_halfway_loses_nothing(
    run: CheckpointFolder, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(run, 1)

    def kill(reached: str) -> None:
        if reached == point:
            raise Killed

    monkeypatch.setattr(folders, "reached", kill)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        save(run.path_of(1), content(1, 5.0))
    monkeypatch.undo()
    expected = 5.0 if point == "renamed" else 1.0
    assert weight_of(run.path_of(1)) == expected  # also before anything is cleaned
    point_found = resolve(run, "auto")
    assert point_found is not None
    assert point_found.path == run.path_of(1)
    assert weight_of(run.path_of(1)) == expected
    assert names(run) == ["step-00000001"]


def test_what_this_process_writes_is_not_cleaned(run: CheckpointFolder) -> None:
    fill(run, 1)
    mine = folders.temporary_path(run.path_of(2), "writing")
    mine.mkdir()
    folders.in_progress.add(mine)
    try:
        assert run.clean() == ()
        assert mine.is_dir()
    finally:
        folders.in_progress.discard(mine)
    assert run.clean() == (mine,)


def test_resume_auto_must_never(run: CheckpointFolder) -> None:
    assert resolve(run, "auto") is None
    assert resolve(run, "never") is None
    run.folder.parent.mkdir(parents=True)
    (run.folder.parent / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"resume: must.*found: config.yaml in"):
        resolve(run, "must")
    fill(run, 1, 2)
    for resume in ("auto", "must"):
        found = resolve(run, resume)
        assert found is not None
        assert (found.path, found.manifest.step, found.passed_over) == (run.path_of(2), 2, ())
    with pytest.raises(CheckpointError, match=r"resume: never.*step-00000001, step-00000002"):
        resolve(run, "never")


def test_a_wrong_resume_path_is_fatal_and_lists_what_is_there(run: CheckpointFolder) -> None:
    fill(run, 1, 2)
    for resume in ("auto", "must"):
        with pytest.raises(CheckpointError, match=r"step-00000009 does not exist[\s\S]*step-00000001, step-00000002"):
            resolve(run, resume, run.path_of(9))
    with pytest.raises(CheckpointError, match=r"no manifest.json[\s\S]*step-00000001"):
        resolve(run, "must", run.folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(run.folder.parent.parent / "rn" / "checkpoints" / "step-00000001", {})
    exact = resolve(run, "must", run.path_of(1))
    assert exact is not None
    assert exact.manifest.step == 1


def test_a_damaged_newest_falls_back_and_says_why(run: CheckpointFolder) -> None:
    fill(run, 1, 2, 3)
    cut = next(run.path_of(3).glob("rank-*"))
    os.truncate(cut, cut.stat().st_size - 1)
    flipped = next(run.path_of(2).glob("rank-*"))
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    found = resolve(run, "auto")
    assert found is not None
    assert found.path == run.path_of(1)
    assert "step-00000003 is damaged: rank-00000.safetensors has" in found.passed_over[0]
    assert "step-00000002 is damaged: rank-00000.safetensors does not match its SHA-256" in found.passed_over[1]
    shutil.rmtree(run.path_of(1))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):  # not a silent fresh start
        resolve(run, "auto")


def test_load_is_strict_about_names_shapes_and_kinds(run: CheckpointFolder) -> None:
    fill(run, 1)
    path = run.path_of(1)
    both = {"model.weight": torch.zeros(3, 2), "optimizer.weight.step": torch.tensor(0.0)}
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: model.bias"):
        load(path, {**both, "model.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: optimizer.weight.step"):
        load(path, {"model.weight": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match=r"model.weight is \[3, 2\] in the checkpoint, \[2, 3\] here"):
        load(path, {**both, "model.weight": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=r"model.weight is float32 in the checkpoint, int64 here"):
        load(path, {**both, "model.weight": torch.zeros(3, 2, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="holds none of the 1"):
        load(path, {"model.x": torch.zeros(1)}, strict=False)
    assert not both["model.weight"].any()  # nothing was touched
    doubles = torch.zeros(3, 2, dtype=torch.float64)
    assert load(path, {"model.weight": doubles, "model.x": torch.zeros(1)}, strict=False) == {"step": 1}
    assert torch.equal(doubles, torch.ones(3, 2, dtype=torch.float64))


def test_tied_tensors_load_under_either_name(tmp_path: Path) -> None:
    weight = torch.randn(4, 2)
    save(tmp_path / "c", CheckpointContent({"model.a": weight}, {"step": 0}, {"model.b": "model.a"}))
    for wanted in (("model.a",), ("model.b",), ("model.a", "model.b")):
        target = {name: torch.zeros(4, 2) for name in wanted}
        load(tmp_path / "c", target)
        assert all(torch.equal(tensor, weight) for tensor in target.values())
    with pytest.raises(CheckpointError, match=r"alias model.b of model.x"):
        save(tmp_path / "d", CheckpointContent({"model.a": weight}, {"step": 0}, {"model.b": "model.x"}))
    assert not (tmp_path / "d").exists()


def test_what_cannot_be_saved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model.z is torch.complex64"):
        save(tmp_path / "c", CheckpointContent({"model.z": torch.zeros(2, dtype=torch.complex64)}, {"step": 0}))
    with pytest.raises(CheckpointError, match="on meta"):
        save(tmp_path / "c", CheckpointContent({"model.z": torch.zeros(2, device="meta")}, {"step": 0}))
    with pytest.raises(CheckpointError, match=r"scalars\['step'\] is None"):
        save(tmp_path / "c", CheckpointContent({}, {}))
    with pytest.raises(CheckpointError, match="surrogate"):  # JSON has no such character
        save(tmp_path / "c", CheckpointContent({}, {"step": 0, "name": "\ud800"}))
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10)
    with pytest.raises(CheckpointError, match="free"):
        save(tmp_path / "c", content(1))
    assert list(tmp_path.iterdir()) == []


def test_asynchronous_save_without_a_group(run: CheckpointFolder) -> None:
    saver = AsyncSaver()
    state = content(1)
    saver.save(run.path_of(1), state)
    state.tensors["model.weight"].fill_(-1)  # training goes on
    saver.save(run.path_of(2), content(2))
    saver.wait()
    assert weight_of(run.path_of(1)) == 1
    assert read_manifest(run.path_of(2)).step == 2
    (run.folder / "thesis").write_text("x")
    saver.save(run.folder / "thesis", content(3))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        saver.save(run.path_of(4), content(4))
    saver.close()
    saver.close()
    with pytest.raises(UsageError, match="after close"):
        saver.save(run.path_of(5), content(5))
    assert names(run) == ["step-00000001", "step-00000002", "thesis"]
