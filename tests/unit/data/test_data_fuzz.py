"""Hostile data sets: whatever stands in their files, reading gives tokens of the vocabulary or a DataError, soon."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_helpers import quick_prepare, write_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright import storage
from trainwright.data.shards import TokenDataset, check
from trainwright.data.tokenize import load_tokenizer
from trainwright.errors import DataError

JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    return quick_prepare(write_texts(folder / "texts", 8), folder / "tokens", shard_tokens=700).path


@pytest.fixture(scope="module")
def copy(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("copy") / "tokens"))


def _read_all(folder: Path) -> None:
    """All that a run would do with it."""
    with contextlib.suppress(DataError):
        dataset = TokenDataset.open(folder)
        for name in ("train", "held_out"):
            split = dataset.split(name)  # type: ignore[arg-type]
            tokens, _, _ = split.read(0, min(split.num_tokens, 5000))
            assert not len(tokens) or 0 <= int(tokens.min()) <= int(tokens.max()) < dataset.vocab_size
        check(folder)


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in items for found in _paths(value, (*path, key)))]


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_a_signed_manifest(data: st.DataObject, good: Path, copy: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *place, key = data.draw(st.sampled_from([p for p in _paths(manifest) if p]))
        target = manifest
        for step in place:
            target = target[step]
        target[key] = data.draw(JSON)
    content = (
        {k: v for k, v in manifest.items() if k not in ("version", "provenance")} if isinstance(manifest, dict) else {}
    )
    if isinstance(content.get("shards"), list):
        content["shards"] = [
            {k: v for k, v in s.items() if k != "checksums"} if isinstance(s, dict) else s for s in content["shards"]
        ]
    try:  # signed as an attacker would
        manifest["version"] = storage.sha256_bytes(storage.canonical_json(content))
        text = json.dumps(manifest)
    except (ValueError, TypeError):
        return
    (copy / "manifest.json").write_text(text, "utf-8", errors="surrogatepass")
    _read_all(copy)


@FUZZ
@given(body=st.binary(max_size=300))
def test_any_bytes_as_a_manifest(body: bytes, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(body)
    _read_all(copy)


@FUZZ
@given(data=st.data())
def test_any_bytes_in_the_files_of_a_signed_data_set(data: st.DataObject, good: Path, copy: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    shutil.copytree(good, copy, dirs_exist_ok=True)
    shard = data.draw(st.sampled_from(manifest["shards"]))
    entry = shard[data.draw(st.sampled_from(["tokens", "documents", "checksums"]))]
    content = bytearray((good / entry["file"]).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    content = content[: entry["bytes"]]
    (copy / entry["file"]).write_bytes(content)
    entry["sha256"] = storage.sha256_bytes(bytes(content))
    signed = {k: v for k, v in manifest.items() if k not in ("version", "provenance")}
    signed["shards"] = [{k: v for k, v in s.items() if k != "checksums"} for s in signed["shards"]]
    manifest["version"] = storage.sha256_bytes(storage.canonical_json(signed))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    _read_all(copy)


@FUZZ
@given(tree=JSON)
def test_any_json_as_a_tokenizer(tree: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "tokenizer.json", None)


def test_a_link_out_of_the_folder_is_not_followed_silently(good: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "tokens"))
    outside = tmp_path / "secret"
    outside.write_bytes(b"not yours")
    (copy / "tokens-00000.bin").unlink()
    (copy / "tokens-00000.bin").symlink_to(outside)
    with pytest.raises(DataError):
        TokenDataset.open(copy)
