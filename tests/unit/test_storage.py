"""storage.py: atomic writes, hashes, names that stay inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright import storage
from trainwright.storage.objects import ObjectStore


def test_atomic_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.atomic_write_bytes(path, b"old")
    storage.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), storage.atomic_write(path) as stream:
        stream.writelines([b"half of the new", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_written_files_have_the_rights_that_the_mask_gives(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        storage.atomic_write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with storage.atomic_folder(tmp_path / "a" / "made") as folder:
        (folder / "x").write_bytes(b"1")
        assert not (tmp_path / "a" / "made").exists()
    assert (tmp_path / "a" / "made" / "x").read_bytes() == b"1"
    with pytest.raises(FileExistsError), storage.atomic_folder(tmp_path / "a" / "made"):
        pass
    with pytest.raises(RuntimeError), storage.atomic_folder(tmp_path / "a" / "broken"):
        raise RuntimeError
    assert [item.name for item in (tmp_path / "a").iterdir()] == ["made"]


def test_json_is_sorted_finite_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    storage.atomic_write_json(path, {"b": 1, "a": "é"})
    assert path.read_text("utf-8").index('"a"') < path.read_text("utf-8").index('"b"')
    assert storage.read_json(path) == {"a": "é", "b": 1}
    with pytest.raises(ValueError):
        storage.atomic_write_json(path, {"x": float("nan")})
    with pytest.raises(ValueError, match="larger than 5"):
        storage.read_json(path, max_bytes=5)
    for broken in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not valid JSON"):
            storage.read_json(path)


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: object) -> None:
    data = storage.canonical_json(value)
    assert json.loads(data) == value
    if isinstance(value, dict):
        assert storage.canonical_json(dict(reversed(list(value.items())))) == data


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_a_file(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "x").write_bytes(data[:size])
    assert storage.sha256_file(tmp_path / "x") == hashlib.sha256(data[:size]).hexdigest()
    assert storage.sha256_bytes(data[:size]) == hashlib.sha256(data[:size]).hexdigest()


@pytest.mark.parametrize("name", ["tokens-00000.bin", "a/b.bin", "..a", "a..b"])
def test_names_inside_their_folder_pass(name: str) -> None:
    assert storage.safe_relative(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "C:\\x", "C:x", "a\\b", "a\0b", "a\nb"]
)
def test_names_that_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a relative path"):
        storage.safe_relative(name)


def test_free_bytes_of_a_folder_to_be(tmp_path: Path) -> None:
    assert storage.free_bytes(tmp_path / "not" / "yet") > 0


def test_urls_go_through_fsspec() -> None:
    assert storage.is_url("s3://bucket/key")
    assert not storage.is_url("/a/b")
    assert not storage.is_url("C:/a")
    ObjectStore("memory://test-storage").write_bytes("x", b"abc")
    assert storage.size_bytes("memory://test-storage/x") == 3
    assert storage.sha256_file("memory://test-storage/x") == hashlib.sha256(b"abc").hexdigest()
    assert storage.read_bytes("memory://test-storage/x", 10) == b"abc"
