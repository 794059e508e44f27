"""`manifest.json`: what a checkpoint holds. Written last; a folder without it is not a checkpoint.

Everything that is not a tensor lives here, and of every tensor its dtype, shape and where each of its chunks lies;
of every file its size and SHA-256. The last line seals the text before it with a SHA-256 of its own, so that a
changed digit in a step counter is noticed as surely as a changed weight. Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from trainwright import storage
from trainwright.errors import CheckpointError

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Chunk",
    "FileEntry",
    "Manifest",
    "TensorEntry",
    "check_json",
    "new_manifest",
    "parse_manifest",
    "read_manifest_file",
    "render_manifest",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30  # 405B parameters in chunks of 1,024 ranks take about a third of it
_MAX_DEPTH = 64
_SEAL = re.compile(rb',\n"seal_sha256":"([0-9a-f]{64})"\}\n\Z')
_SEAL_BYTES = len(b',\n"seal_sha256":""}\n') + 64

# Name in the manifest: (torch's dtype, safetensors' code for it).
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": (torch.float8_e5m2, "F8_E5M2"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "int16": (torch.int16, "I16"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}

Extent = Annotated[int, Field(ge=0, le=1 << 60)]
Text = Annotated[str, Field(max_length=4096)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Chunk(_Part):
    """A box of a tensor: `shape` elements from `offset`, in `file`."""

    file: Text
    offset: tuple[Extent, ...]
    shape: tuple[Extent, ...]

    def key(self, name: str) -> str:
        """The chunk's name inside its safetensors file: the tensor's name and where the chunk begins."""
        return f"{name}@{','.join(map(str, self.offset))}"


class TensorEntry(_Part):
    """A whole tensor: dtype (a key of DTYPES), shape and the chunks that tile it. A tensor of no elements has none."""

    dtype: Text
    shape: tuple[Extent, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize


class FileEntry(_Part):
    """A file of the checkpoint's folder."""

    size_bytes: Extent
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Part):
    """A checkpoint's table of contents. `created` is UTC, ISO 8601."""

    format_version: int
    created: AwareDatetime
    trainwright_version: Text
    torch_version: Text
    world_size: Annotated[int, Field(ge=1)]
    step: Extent
    aliases: dict[str, str]
    """Tied tensors: the other name -> the name under which the tensor is stored."""
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    scalars: dict[str, JsonValue]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size_bytes for entry in self.files.values())

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        """Every chunk lies in a listed file and the chunks of a tensor tile it: no gap, no overlap."""
        for name in self.files:
            storage.safe_relative(name)
            if "/" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not a file name of this format")
        for name, entry in self.tensors.items():
            _check_tiling(name, entry, self.files)
        for alias, target in self.aliases.items():
            if target not in self.tensors or alias in self.tensors:
                raise ValueError(f"alias {alias!r} of {target!r}")
        return self


def _check_tiling(name: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    if entry.dtype not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype {entry.dtype!r}")
    rank, covered = len(entry.shape), 0
    for chunk in entry.chunks:
        if chunk.file not in files:
            raise ValueError(f"tensor {name!r}: file {chunk.file!r} is not listed")
        inside = len(chunk.offset) == len(chunk.shape) == rank and all(
            size > 0 and offset + size <= whole
            for offset, size, whole in zip(chunk.offset, chunk.shape, entry.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"tensor {name!r}: chunk at {chunk.offset} of {chunk.shape} in {entry.shape}")
        covered += math.prod(chunk.shape)
    if covered != math.prod(entry.shape):
        raise ValueError(f"tensor {name!r}: {covered} of {math.prod(entry.shape)} elements")
    # With the count right and every chunk inside, no overlap means no gap. A sweep over the first dimension.
    open_chunks: list[Chunk] = []
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offset):
        open_chunks = [other for other in open_chunks if other.offset[0] + other.shape[0] > chunk.offset[0]]
        if any(_overlap(chunk, other) for other in open_chunks):
            raise ValueError(f"tensor {name!r}: chunks overlap at {chunk.offset}")
        open_chunks.append(chunk)


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(
        a.offset[i] < b.offset[i] + b.shape[i] and b.offset[i] < a.offset[i] + a.shape[i] for i in range(len(a.offset))
    )


def check_json(value: Any, where: str = "scalars", depth: int = 0) -> Any:
    """`value` as plain JSON data (tuples become lists). Raises CheckpointError naming the place that is not."""
    rule = "beside tensors a checkpoint holds JSON: None, bool, int, float, str, list and dict with str keys"
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{where} is nested deeper than {_MAX_DEPTH}", rule, "flatten it")
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str) and not _is_text(value):
        raise CheckpointError(f"{where} holds a lone surrogate: {value[:40]!r}", rule, "use valid Unicode text")
    if value is None or isinstance(value, (bool, int, float, str)):
        return _plain(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not _is_text(key):
                raise CheckpointError(f"{where} has the key {key!r}, a {type(key).__name__}", rule, f"use {str(key)!r}")
        return {str(key): check_json(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [check_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    remedy = "use value.item()" if hasattr(value, "item") else "convert it with float(), int(), str() or list()"
    raise CheckpointError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}", rule, remedy)


def _is_text(value: str) -> bool:
    """Whether UTF-8 has it (a lone surrogate it has not)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: bool | int | float | str | None) -> bool | int | float | str | None:
    """Subclasses (numpy.float64 is one of float) as what they derive from, so that they read back equal."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    return int(value) if isinstance(value, int) else float(value)


def new_manifest(
    scalars: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry],
    files: Mapping[str, FileEntry],
    aliases: Mapping[str, str],
    world_size: int,
) -> Manifest:
    """The manifest of a save that happens now. `scalars["step"]` is the step. Raises CheckpointError."""
    try:
        return Manifest(
            format_version=FORMAT_VERSION,
            created=datetime.now(UTC),
            trainwright_version=metadata.version("trainwright"),
            torch_version=str(torch.__version__),
            world_size=world_size,
            step=scalars["step"],
            aliases=dict(aliases),
            files=dict(files),
            tensors=dict(tensors),
            scalars=dict(scalars),
        )
    except ValidationError as error:
        raise CheckpointError(f"this state makes no valid checkpoint: {_first(error)}") from None


def render_manifest(manifest: Manifest) -> bytes:
    """The file's bytes: a JSON object, a line per file and per tensor, sealed by the SHA-256 of what comes before."""
    fields = manifest.model_dump()
    fields["created"] = manifest.created.isoformat()
    parts = []
    for key, value in fields.items():
        text = json.dumps(value, separators=(",", ":"))
        if key in ("files", "tensors", "scalars") and value:
            lines = [f"{json.dumps(name)}:{json.dumps(item, separators=(',', ':'))}" for name, item in value.items()]
            text = "{\n" + ",\n".join(lines) + "}"
        parts.append(f"{json.dumps(key)}:{text}")
    body = ("{\n" + ",\n".join(parts)).encode()
    seal = hashlib.sha256(body + b"}").hexdigest()
    return body + b',\n"seal_sha256":"' + seal.encode() + b'"}\n'


def parse_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest in `data`. Raises CheckpointError, and nothing else, whatever the bytes are."""
    remedy = "resume from another checkpoint; this one was changed after it was written"
    rule = "a manifest ends with a seal: the SHA-256 of the text before it"
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{where}: {len(data):,} bytes", f"at most {MAX_MANIFEST_BYTES:,}", remedy)
    found = _SEAL.search(data, max(0, len(data) - _SEAL_BYTES))
    if found is None:
        raise CheckpointError(f"{where} has no seal at its end", rule, remedy)
    body = data[: found.start()] + b"}"
    if hashlib.sha256(body).hexdigest().encode() != found.group(1):
        raise CheckpointError(f"{where} does not match its seal", rule, remedy)
    return parse_body(body, where)


def parse_body(body: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest without its seal. Raises CheckpointError."""
    version = re.match(rb'\s*\{\s*"format_version"\s*:\s*(\d{1,9})\s*,', body)
    if version is not None and int(version.group(1)) > FORMAT_VERSION:
        got = f"{where} has format version {int(version.group(1))}"
        raise CheckpointError(got, f"this release reads versions up to {FORMAT_VERSION}", "update trainwright")
    try:
        manifest = Manifest.model_validate_json(body)
    except (ValidationError, ValueError, RecursionError) as error:
        got = f"{where}: {_first(error) if isinstance(error, ValidationError) else error}"
        raise CheckpointError(got, "docs/checkpoints.md has the format", "resume from another checkpoint") from None
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(f"{where} has format version {manifest.format_version}", f"known: {FORMAT_VERSION}")
    return manifest


def read_manifest_file(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`. Raises CheckpointError, FileNotFoundError or another OSError."""
    try:
        data = storage.read_bytes(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise CheckpointError(str(error), f"at most {MAX_MANIFEST_BYTES:,} bytes") from None
    return parse_manifest(data, str(folder / MANIFEST_NAME))


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, detail["loc"]))
    return f"{place}: {detail['msg']}" if place else detail["msg"]
