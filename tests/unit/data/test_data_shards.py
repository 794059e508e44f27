"""manifest.py and shards.py: hostile and damaged data sets are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import quick_prepare, write_jsonl, write_texts

from trainwright import storage
from trainwright.data import TokenDataset, check
from trainwright.data.manifest import Manifest
from trainwright.errors import DataError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    return quick_prepare(write_texts(folder / "texts", 20), folder / "tokens", shard_tokens=1500).path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "tokens"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Changes the manifest; with `sign` the way an attacker would, version included."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(manifest)
    if sign:
        content = {key: value for key, value in manifest.items() if key not in ("version", "provenance")}
        content["shards"] = [{k: v for k, v in shard.items() if k != "checksums"} for shard in content["shards"]]
        manifest["version"] = storage.sha256_bytes(storage.canonical_json(content))
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_the_version_can_be_computed_by_anyone(copy: Path) -> None:
    rewrite(copy, lambda manifest: None)
    assert TokenDataset.open(copy).version == check(copy).version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0]["tokens"].update(file="../../etc/passwd"), "not a relative path"),
        (lambda m: m["shards"][0]["tokens"].update(file="/etc/passwd"), "not a relative path"),
        (lambda m: m["tokenizer"].update(file="a\\..\\b"), "not a relative path"),
        (lambda m: m["shards"][0].update(num_tokens=10**30), "num_tokens"),
        (lambda m: m["shards"][0].update(num_tokens=-5), "num_tokens"),
        (lambda m: m["shards"][0].update(num_tokens="many"), "num_tokens"),
        (lambda m: m["shards"][0].update(num_tokens=1), "as long as"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m["shards"].pop(), "the splits hold all"),
        (lambda m: m["splits"]["train"].update(num_tokens=10**9), "held-out split follows"),
        (lambda m: m["splits"]["held_out"].update(first_token=0), "held-out split follows"),
        (lambda m: m["splits"]["train"].update(num_counted=10**9), "counted"),
        (lambda m: m.update(vocab_size=70_000), "65,536"),
        (lambda m: m.update(eos_id=10**6), "eos_id"),
        (lambda m: m.update(dtype="object"), "dtype"),
        (lambda m: m.update(format="pickle"), "format"),
        (lambda m: m.update(extra="?"), "extra"),
        (lambda m: m.pop("splits"), "splits"),
        (lambda m: m["shards"][1]["tokens"].update(m["shards"][0]["tokens"]), "as long as|a name of its own"),
        (lambda m: m.update(format_version=2), "format version 2"),
    ],
)
def test_hostile_manifests_are_refused(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(DataError, match=message):
        TokenDataset.open(copy)


def test_a_manifest_changed_by_hand_is_refused(copy: Path) -> None:
    rewrite(copy, lambda manifest: manifest["settings"].update(held_out=0.5), sign=False)
    with pytest.raises(DataError, match="was changed after it was written"):
        TokenDataset.open(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"format_version": 1}'])
def test_damaged_manifests_are_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(DataError):
        TokenDataset.open(copy)


def test_missing_and_short_files_are_named_at_once(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token data set"):
        TokenDataset.open(tmp_path / "nowhere")
    with open(copy / "tokens-00001.bin", "ab") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"tokens-00001\.bin has 100 bytes"):
        TokenDataset.open(copy)
    (copy / "tokens-00001.bin").unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.bin is missing"):
        TokenDataset.open(copy)


@pytest.mark.parametrize("number", [0, 7, 19])
def test_check_names_the_document_with_a_flipped_bit(copy: Path, number: int) -> None:
    """Documents lie across shards here: some end in a later one than they begin in."""
    dataset = TokenDataset.open(copy)
    stream = dataset._stream
    start = next(p for p in range(stream.starts[-1]) if stream.read(p, 1)[2][0] == number)
    shard = int(np.searchsorted(stream.starts, start, side="right")) - 1
    path = copy / dataset.manifest.shards[shard].tokens.file
    data = bytearray(path.read_bytes())
    data[2 * (start - int(stream.starts[shard]))] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=rf"{path.name} has .*first damaged document is {number} \(.*{number:02d}\.txt\)"
    ):
        check(copy)


def test_a_data_set_from_before_the_checksums_is_read(copy: Path) -> None:
    version = TokenDataset.open(copy).version
    rewrite(copy, lambda m: [shard.pop("checksums") for shard in m["shards"]])
    assert TokenDataset.open(copy).version == version
    check(copy)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin", "tokenizer.json"])
def test_check_names_the_file_with_a_flipped_bit(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    TokenDataset.open(copy)  # sizes are right: only hashing finds it
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        check(copy)


def test_a_token_outside_the_vocabulary_never_reaches_a_model(copy: Path) -> None:
    tokens = np.fromfile(copy / "tokens-00000.bin", dtype="<u2")
    tokens[10] = 65_535
    tokens.tofile(copy / "tokens-00000.bin")
    split = TokenDataset.open(copy).split("train")
    split.read(11, 20)
    with pytest.raises(DataError, match="token 65535"):
        split.read(0, 20)


def test_reading_is_bounded_by_the_split(good: Path) -> None:
    dataset = TokenDataset.open(good)
    split = dataset.split("train")
    assert split.num_sequences(split.num_tokens - 1) == 1
    assert split.num_sequences(split.num_tokens) == 0
    assert len(split.read(0, 0)[0]) == 0
    for start, length in ((-1, 5), (0, split.num_tokens + 1), (split.num_tokens, 1), (0, -1)):
        with pytest.raises(ValueError, match="not inside"):
            split.read(start, length)
    with pytest.raises(DataError, match="splits are"):
        dataset.split("test")  # type: ignore[arg-type]


def test_masks_exist_only_where_something_is_masked(tmp_path: Path) -> None:
    records: list[dict[str, str]] = [{"text": "plain words " * 30} for _ in range(4)]
    records += [{"prompt": "question " * 30, "completion": "answer " * 30}]
    records += [{"text": "more plain words " * 30} for _ in range(4)]
    source = write_jsonl(tmp_path / "mixed.jsonl", records)
    result = quick_prepare(source, tmp_path / "tokens", shard_tokens=100, held_out=0.0)
    masked = [shard.mask is not None for shard in result.manifest.shards]
    assert any(masked)
    assert not all(masked)
    split = TokenDataset.open(result.path).split("train")
    _, mask, documents = split.read(0, split.num_tokens)
    assert mask is not None
    assert int(mask.sum()) == split.num_counted
    assert set(documents[mask == 0].tolist()) == {4}
    assert split.read(0, 50)[1] is None
    check(result.path)


def test_the_manifest_says_what_the_format_is(good: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text("utf-8"))
    assert set(manifest) == set(Manifest.model_fields)
    assert manifest["format"] == "trainwright-tokens"
    assert "/" not in json.dumps(manifest["settings"])  # no path is part of the version
