"""Data sets by URL: one download a machine, by version, verified, taken up again; what is told when it cannot be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from texts import words
from trainwright.cli import main
from trainwright.data import prepare, remote
from trainwright.data.manifest import MANIFEST
from trainwright.data.settings import PrepareSettings
from trainwright.data.shards import TokenDataset, check
from trainwright.errors import DamagedObjectError, DataError, StorageError
from trainwright.storage.objects import ObjectStore


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plays")
    for index in range(4):
        (root / f"{index}.txt").write_text(words(index, 300))
    prepare(str(root / "*.txt"), root / "data", PrepareSettings(vocab_size=300, held_out=0.2, shard_tokens=1000))
    return root / "data"


def test_the_command_pushes_and_a_url_trains_like_the_folder(plays: Path, s3: str, tmp_path: Path) -> None:
    assert main(["data", "push", str(plays), s3]) == 0
    expected, found = TokenDataset.open(plays), TokenDataset.open(s3, tmp_path / "cache")
    assert found.version == expected.version
    assert found.path == tmp_path / "cache" / expected.version
    for name in ("train", "held_out"):
        ours, theirs = found.split(name), expected.split(name)
        assert np.array_equal(ours.read(0, ours.num_tokens)[0], theirs.read(0, theirs.num_tokens)[0])
    check(found.path)
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left == [f".{expected.version}.lock", expected.version]


def test_it_is_downloaded_once_and_again_when_it_is_damaged(
    plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache = f"file://{tmp_path}/store", tmp_path / "cache"
    remote.upload(plays, url)
    first = remote.local_copy(url, cache)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "download", lambda *_: pytest.fail("downloaded again"))
        assert remote.local_copy(url, cache) == first
    shard = next(first.glob("tokens-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert remote.local_copy(url, cache) == first
    check(first)


def test_a_download_that_was_killed_goes_on(plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, cache = f"file://{tmp_path}/store", tmp_path / "cache"
    manifest = remote.upload(plays, url)
    download, done = ObjectStore.download, []

    def killed(self: ObjectStore, name: str, path: Path, size_bytes: int, sha256: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        download(self, name, path, size_bytes, sha256)

    monkeypatch.setattr(ObjectStore, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        remote.local_copy(url, cache)
    assert not (cache / manifest.version).exists()
    before = set(done)
    done.clear()
    done.extend([""] * 3)  # no more kills
    remote.local_copy(url, cache)
    assert before.isdisjoint(done[3:])
    assert len(before) + len(done[3:]) == len(manifest.files())
    check(cache / manifest.version)


def test_several_processes_download_once(plays: Path, s3: str, tmp_path: Path) -> None:
    remote.upload(plays, s3)
    code = f"from trainwright.data.remote import local_copy; print(local_copy({s3!r}, {str(tmp_path)!r}))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert {process.returncode for process in processes} == {0}, outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum(err.count("downloading") for _, err in outputs) == 1


@pytest.mark.parametrize("harm", ["cut", "altered", "deleted"])
def test_a_harmed_object_is_refused_by_name(plays: Path, tmp_path: Path, harm: str) -> None:
    url = f"memory://{tmp_path.name}"
    name = remote.upload(plays, url).shards[0].tokens.file
    store = ObjectStore(url)
    data = store.read_bytes(name, 1 << 20)
    assert data is not None
    if harm == "deleted":
        store.delete([name])
    else:
        store.write_bytes(name, data[:-2] if harm == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DamagedObjectError, match=name):
        remote.local_copy(url, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("[!.]*")) == []


def test_an_upload_cut_short_is_no_data_set(plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{tmp_path.name}"
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write_bytes", lambda *_: pytest.fail("no manifest may be written"))
        patch.setattr(ObjectStore, "check", lambda *_: None)
        patch.setattr(ObjectStore, "upload", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            remote.upload(plays, url)
    with pytest.raises(DataError, match=MANIFEST) as error:
        TokenDataset.open(url, tmp_path / "cache")
    assert "data push" in error.value.remedy


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_wrong_is_told_before_anything_starts(
    plays: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "model.preset=llama-1m", "steps=1", "batch.global_size=2", f"run_dir={tmp_path / 'run'}"]
    for settings, told in (
        (["data.path=s3://no-such-bucket/plays"], "bucket does not exist"),
        ([f"data.path={s3}"], f"no token data set at {s3}"),
        ([f"data.path={plays}", "checkpoint.store=s3://no-such-bucket/run"], "bucket does not exist"),
        ([f"data.path={plays}", "checkpoint.store=s4://x/y"], "s4:// is not known"),
    ):
        assert main([*common, *settings]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "remedy:" in error
    assert not (tmp_path / "run").exists()
    remote.upload(plays, s3)
    monkeypatch.setattr("trainwright.storage.free_bytes", lambda path: 10)
    with pytest.raises(DataError, match="GB free") as error:
        TokenDataset.open(s3, tmp_path / "cache")
    assert "data.cache" in error.value.remedy


def test_a_damaged_set_is_not_uploaded(plays: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(plays, copy)
    shard = next(copy.glob("tokens-*.bin"))
    data = shard.read_bytes()
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match=shard.name):
        remote.upload(copy, f"memory://{tmp_path.name}")
    with pytest.raises(StorageError):
        remote.upload(plays, "s4://x")
