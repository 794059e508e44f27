"""storage/objects.py on memory, a folder and a real S3 server: whole or an error that says what to do, never half."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from object_server import BUCKET, CuttingProxy, environment, forget_connections
from trainwright.errors import DamagedObjectError, StorageError
from trainwright.storage.objects import ObjectStore, Retry

QUICK = Retry(attempts=3, first_wait_s=0.01)


def entry_of(path: Path) -> tuple[int, str]:
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return ObjectStore(request.getfixturevalue("s3"), QUICK)
    return ObjectStore(
        {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/objects"}[request.param], QUICK
    )


def test_objects_are_written_listed_copied_read_and_deleted(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(300_000))
    size_bytes, sha256 = entry_of(file)
    assert store.sizes() == {}
    store.check()
    assert store.sizes() == {}
    store.upload(file, "a/file", size_bytes, sha256)
    store.write_bytes("a/manifest.json", b"{}")
    store.write_bytes("a/manifest.json", b"{ }")
    assert store.sizes() == {"a/file": size_bytes, "a/manifest.json": 3}
    assert store.sizes("a") == store.sizes()
    assert store.sizes("b") == {}
    store.copy("a/file", "b/file")
    store.download("b/file", tmp_path / "back", size_bytes, sha256)
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert store.read_bytes("a/manifest.json", 3) == b"{ }"
    assert store.read_bytes("a/nothing", 3) is None
    assert store.exists("a/file")
    assert not store.exists("a")
    store.delete(["a/manifest.json", "a/nothing", "a/file"])
    assert store.sizes() == {"b/file": size_bytes}


def test_an_object_that_is_not_what_it_should_be_is_named_and_leaves_no_file(
    store: ObjectStore, tmp_path: Path
) -> None:
    store.write_bytes("x", b"0123456789")
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    for name, size_bytes, digest, told in (
        ("x", 11, sha256, "10 of 11 bytes"),
        ("x", 9, sha256, "of 9 bytes"),
        ("x", 10, "0" * 64, "does not match its SHA-256"),
        ("y", 10, sha256, "y is missing"),
    ):
        with pytest.raises(DamagedObjectError, match=told):
            store.download(name, tmp_path / "back", size_bytes, digest)
    assert list(tmp_path.glob("*back*")) == []


def test_an_upload_that_arrives_changed_is_made_again_and_then_refused(store: ObjectStore, tmp_path: Path) -> None:
    """A file system that loses the last byte of what it is given, the first time or always."""
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    put, losses = store._filesystem.put_file, [1]

    def lossy(source: str, target: str, **options: Any) -> None:
        put(source, target, **options)
        if losses[0]:
            losses[0] -= 1
            store._filesystem.pipe_file(target, b"012345678")

    store._filesystem.put_file = lossy
    try:
        store.upload(file, "x", *entry_of(file))
        assert store.read_bytes("x", 10) == b"0123456789"
        losses[0] = 100
        with pytest.raises(DamagedObjectError, match=r"x has 9 of 10 bytes"):
            store.upload(file, "x", *entry_of(file))
    finally:
        store._filesystem.put_file = put


def test_waits_grow_and_are_bounded() -> None:
    waits = list(Retry(attempts=6, first_wait_s=1, longest_wait_s=4).waits())
    assert len(waits) == 5
    assert all(0.5 * whole <= wait <= whole for wait, whole in zip(waits, (1, 2, 4, 4, 4), strict=True))


def test_a_cut_connection_is_borne_and_a_lasting_cut_is_an_error(
    s3: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_000))
    proxy = CuttingProxy(s3_port, after_bytes=1_000_000)
    forget_connections()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    try:
        store = ObjectStore(s3, QUICK)
        store._filesystem.retries = 1  # of s3fs's own: ours are looked at
        proxy.cuts_left = 2
        store.upload(file, "x", *entry_of(file))
        assert proxy.cuts == 2
        proxy.cuts_left = 10_000
        with pytest.raises(StorageError, match="y: writing"):
            store.upload(file, "y", *entry_of(file))
        proxy.cuts_left = 0
        assert store.sizes() == {"x": 3_000_000}  # of y there is nothing, not half
    finally:
        proxy.close()


def test_wrong_buckets_keys_schemes_and_addresses_are_told(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="bucket does not exist") as no_bucket:
        ObjectStore("s3://no-such-bucket/x").check()
    assert "create the bucket" in no_bucket.value.remedy
    with pytest.raises(StorageError, match="s3x:// is not known"):
        ObjectStore("s3x://bucket/x")
    with pytest.raises(StorageError) as no_package:
        ObjectStore("gs://bucket/x")
    assert no_package.value.remedy == "pip install gcsfs"
    forget_connections()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9") as unreachable:
        ObjectStore(f"s3://{BUCKET}/x").check()
    assert "AWS_ENDPOINT_URL" in unreachable.value.remedy


def test_without_credentials_and_without_s3fs(s3_port: int, tmp_path: Path) -> None:
    code = "from trainwright.storage.objects import ObjectStore; ObjectStore('s3://b/x').check()"
    for hidden, told in (
        ("", "no credentials were found"),
        ("import sys; sys.modules['s3fs'] = None; ", "trainwright[s3]"),
    ):
        variables = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        variables |= {
            "AWS_ENDPOINT_URL": environment(s3_port)["AWS_ENDPOINT_URL"],
            "HOME": str(tmp_path),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        done = subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True, env=variables)
        assert told in done.stderr, done.stderr
