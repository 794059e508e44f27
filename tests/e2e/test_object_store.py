"""`trainwright train` from and to an S3 server: resumed elsewhere on other ranks; a store that is away for a while."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from texts import words
from trainwright.checkpoint.store import CheckpointStore
from trainwright.config import load_config
from trainwright.data import PrepareSettings, prepare
from trainwright.data.remote import upload
from trainwright.data_seen import seen
from trainwright.errors import CheckpointError
from trainwright.monitor.metrics import read_metrics
from trainwright.storage.objects import Retry
from trainwright.training_run import run_training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for index in range(6):
        (root / f"{index}.txt").write_text(words(index, 400))
    prepare(str(root / "*.txt"), root / "data", PrepareSettings(vocab_size=300, held_out=0.2))
    return root / "data"


def settings(run_dir: Path, data: str | Path, *more: str) -> list[str]:
    return [
        "model.transformer={dim: 32, layers: 2, heads: 2}", f"data.path={data}", "data.sequence_length=16",
        "batch.global_size=12", "steps=12", "lr_schedule=cosine", "checkpoint.every=4", "compile=false", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def train(nproc: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "trainwright.cli", "train", *arguments, "--nproc", str(nproc)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run).steps]


def test_a_run_goes_on_elsewhere_on_another_number_of_ranks(data: Path, s3: str, tmp_path: Path) -> None:
    upload(data, f"{s3}/data")
    common = [f"checkpoint.store={s3}/run", "checkpoint.keep=0", "zero=2"]
    output = train(2, *settings(tmp_path / "one", f"{s3}/data", *common, f"data.cache={tmp_path / 'cache-1'}"))
    assert output.count("downloading") == 1
    store = CheckpointStore(f"{s3}/run")
    assert [str(checkpoint) for checkpoint in store.list()] == ["step-00000004", "step-00000008", "step-00000012"]
    for name in ("step-00000008", "step-00000012"):
        store.remove(name)
    elsewhere = settings(tmp_path / "two", f"{s3}/data", *common, f"data.cache={tmp_path / 'cache-2'}", "zero=3")
    output = train(3, *elsewhere)
    assert "at step 4 (written on 2 rank(s) at ZeRO 2)" in output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one")[4:], rel=1e-5)
    whole, rest = seen(tmp_path / "one"), seen(tmp_path / "two")
    assert whole.problems == rest.problems == ()
    assert rest.samples.tolist() == whole.samples[whole.of_step > 4].tolist()
    assert [str(checkpoint) for checkpoint in store.list()] == ["step-00000004", "step-00000008", "step-00000012"]


class Link:
    """Uploads fail while it is down; `left` of them (a negative number: all)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        put = MemoryFileSystem.put_file

        def maybe(filesystem: MemoryFileSystem, *arguments: Any, **options: Any) -> None:
            if self.left:
                self.left -= 1
                raise OSError("the link is down")
            put(filesystem, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", maybe)
        monkeypatch.setattr(
            "trainwright.storage.objects.Retry", functools.partial(Retry, attempts=2, first_wait_s=0.001)
        )


def test_a_store_that_is_away_does_not_stop_the_run_and_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    link = Link(monkeypatch, left=3)  # the first save's two tries, and one of the second's
    url = f"memory://{tmp_path.name}/run"
    run_training(load_config(None, settings(tmp_path / "run", data, f"checkpoint.store={url}")))
    assert link.left == 0
    assert "step-00000004 is whole in" in capsys.readouterr().out.replace("\n", " ")
    assert [str(checkpoint) for checkpoint in CheckpointStore(url).list()] == ["step-00000008", "step-00000012"]


# A run that ends with an error leaves its open files to the end of the process.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_that_is_away_at_the_end_is_an_error_that_the_same_command_mends(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(monkeypatch, left=-1)
    url = f"memory://{tmp_path.name}/run"
    resolved = load_config(None, settings(tmp_path / "run", data, f"checkpoint.store={url}"))
    with pytest.raises(CheckpointError, match=r"step-00000012 is whole in .* but could not be uploaded") as error:
        run_training(resolved)
    assert "the same command" in error.value.remedy
    assert CheckpointStore(url).list() == ()
    link.left = 0
    assert run_training(resolved).status == "finished"
    assert [str(checkpoint) for checkpoint in CheckpointStore(url).list()] == ["step-00000012"]
    assert len(losses(tmp_path / "run")) == 12
