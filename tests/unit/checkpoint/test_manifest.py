"""The manifest: what is written reads back equal; whatever else is read gives a CheckpointError and nothing else."""

from __future__ import annotations

import enum
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright.checkpoint.manifest import (
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    check_json,
    new_manifest,
    parse_body,
    parse_manifest,
    read_manifest_file,
    render_manifest,
)
from trainwright.checkpoint.shard_file import header_problem, write_shard_file
from trainwright.errors import CheckpointError

FILES = {f"rank-0000{i}.safetensors": FileEntry(size_bytes=100 + i, sha256="ab" * 32) for i in range(2)}


def entry(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> TensorEntry:
    chunks = tuple(
        Chunk(file=f"rank-0000{i % 2}.safetensors", offset=offset, shape=size) for i, (offset, size) in enumerate(boxes)
    )
    return TensorEntry(dtype="float32", shape=shape, chunks=chunks)


def example() -> Manifest:
    tensors = {
        "model.weight": entry((5, 3), ((0, 0), (3, 3)), ((3, 0), (2, 3))),
        "model.grid": entry((4, 4), ((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 4))),
        "model.empty": entry((0, 4)),
        "optimizer.step": entry((), ((), ())),
    }
    scalars = {"step": 7, "tokens": 2**70, "state": {"ü": [1.5, None, True, "text", math.inf, -0.0]}}
    return new_manifest(scalars, tensors, FILES, {"model.head": "model.weight"}, world_size=2)


def seal(body: bytes) -> bytes:
    body = body.rstrip().removesuffix(b"}")
    digest = hashlib.sha256(body + b"}").hexdigest().encode()
    return body + b',\n"seal_sha256":"' + digest + b'"}\n'


EXAMPLE = example()
BODY = render_manifest(EXAMPLE).split(b',\n"seal_sha256"')[0] + b"}"


def test_what_is_written_reads_back_equal() -> None:
    manifest = EXAMPLE
    data = render_manifest(manifest)
    assert parse_manifest(data) == manifest
    assert parse_manifest(data).step == 7
    assert render_manifest(parse_manifest(data)) == data
    assert json.loads(data)["tensors"]["model.weight"]["shape"] == [5, 3]  # any JSON reader reads it
    assert seal(BODY) == data


def test_nan_in_the_state_survives() -> None:
    manifest = new_manifest({"step": 0, "loss": math.nan}, {}, {}, {}, 1)
    value = parse_manifest(render_manifest(manifest)).scalars["loss"]
    assert isinstance(value, float)
    assert math.isnan(value)


@given(st.integers(0, 10**9), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    data = bytearray(render_manifest(EXAMPLE))
    data[position % len(data)] ^= change
    with pytest.raises(CheckpointError):
        parse_manifest(bytes(data))


@given(st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_a_truncated_manifest_is_noticed(length: int) -> None:
    data = render_manifest(EXAMPLE)
    with pytest.raises(CheckpointError):
        parse_manifest(data[: length % len(data)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def paths(value: object, prefix: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = [prefix]
    if isinstance(value, dict):
        found += [path for key, item in value.items() for path in paths(item, (*prefix, key))]
    elif isinstance(value, list):
        found += [path for i, item in enumerate(value) for path in paths(item, (*prefix, i))]
    return found


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_json_under_a_right_seal_gives_a_manifest_or_a_checkpoint_error(data: st.DataObject) -> None:
    fields = json.loads(BODY)
    path = data.draw(st.sampled_from(paths(fields)[1:]))
    place = fields
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(json_values)  # type: ignore[index]
    elif isinstance(place, dict):
        del place[path[-1]]  # type: ignore[arg-type]
    body = json.dumps(fields).encode()
    try:
        manifest = parse_manifest(seal(body))
    except CheckpointError:
        return
    assert parse_manifest(render_manifest(manifest)) is not None


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_json_give_a_checkpoint_error(body: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_body(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"format_version":' + b"9" * 10_000 + b"}",
        b"\xff\xfe{}",
        b"",
        b"null",
        b'{"format_version":NaN}',
    ],
)
def test_hostile_json(body: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_body(body)


def test_a_newer_format_says_so() -> None:
    with pytest.raises(CheckpointError, match="format version 2"):
        parse_manifest(seal(BODY.replace(b'"format_version":1', b'"format_version":2')))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (entry((5, 3), ((0, 0), (3, 3))), "9 of 15 elements"),
        (entry((4, 3), ((0, 0), (2, 3)), ((0, 0), (2, 3))), "overlap"),
        (entry((4, 4), ((0, 0), (4, 2)), ((1, 1), (2, 2)), ((0, 3), (4, 1))), "overlap"),
        (entry((4, 3), ((1, 0), (4, 3))), "chunk at"),
        (entry((4, 3), ((0,), (12,))), "chunk at"),
        (entry((4,)), "0 of 4 elements"),
        (entry((4,), ((0,), (4,))).model_copy(update={"dtype": "complex64"}), "complex64"),
        (TensorEntry(dtype="int8", shape=(1,), chunks=(Chunk(file="../x", offset=(0,), shape=(1,)),)), "not listed"),
    ],
)
def test_chunks_must_tile_their_tensor(tensor: TensorEntry, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        new_manifest({"step": 0}, {"model.w": tensor}, FILES, {}, 1)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.pt", "C:\\x.safetensors"]
)
def test_file_names_stay_in_the_folder(name: str) -> None:
    files = {name: FileEntry(size_bytes=1, sha256="0" * 64)}
    with pytest.raises(CheckpointError):
        new_manifest({"step": 0}, {}, files, {}, 1)


def test_read_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_manifest_file(tmp_path)
    (tmp_path / "manifest.json").write_bytes(render_manifest(EXAMPLE))
    assert read_manifest_file(tmp_path) == example().model_copy(
        update={"created": read_manifest_file(tmp_path).created}
    )


class Colour(enum.Enum):
    RED = "red"


def test_check_json_makes_plain_data() -> None:
    value = check_json({"a": (1, 2), "b": np.float64(0.5), "c": Colour.RED, "d": {"e": [None, True]}})
    assert value == {"a": [1, 2], "b": 0.5, "c": "red", "d": {"e": [None, True]}}
    assert type(value["b"]) is float


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": {1: 2}}, "scalars.a has the key 1"),
        ({"a": [torch.ones(1)]}, r"scalars.a\[0\] is a torch.Tensor"),
        ({"a": np.float32(1)}, "scalars.a is a numpy.float32"),
        ({"a": b"x"}, "scalars.a is a builtins.bytes"),
        ({"a": object()}, "scalars.a"),
    ],
)
def test_check_json_names_the_place(value: object, where: str) -> None:
    with pytest.raises(CheckpointError, match=where):
        check_json(value)


def test_check_json_of_a_cycle() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(CheckpointError, match="nested"):
        check_json(value)


def test_shard_file_is_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "odd": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "transposed": torch.randn(3, 4).t(),
        "bf16": torch.randn(5).bfloat16(),
        "view": torch.arange(10)[2:7],
    }
    path = tmp_path / "x.safetensors"
    written = write_shard_file(path, list(tensors.items()))
    data = path.read_bytes()
    assert written == FileEntry(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert header_problem(path, {"bf16": ("bfloat16", (5,)), "scalar": ("float64", ())}) is None
    assert "not in it" in str(header_problem(path, {"other": ("bfloat16", (5,))}))
    assert "BF16" in str(header_problem(path, {"bf16": ("float16", (5,))}))
    path.write_bytes(data[:20])
    assert "not a safetensors file" in str(header_problem(path, {}))
