"""One rank's safetensors file: written in one pass with its hash, looked into without loading it.

Format: https://github.com/huggingface/safetensors#format. The writer is ours because the library's copies every
tensor into a bytes object before it writes, and hashes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from trainwright.checkpoint.manifest import DTYPES, FileEntry

__all__ = ["dtype_name", "header_problem", "write_shard_file"]

_PIECE_BYTES = 16 << 20
_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str | None:
    """The manifest's name for `dtype`, or None where the format has none (complex, quantised)."""
    return _NAMES.get(dtype)


def write_shard_file(path: Path, chunks: Sequence[tuple[str, torch.Tensor]]) -> FileEntry:
    """Writes (key, tensor) pairs as a new safetensors file, on the disk when this returns; its size and SHA-256.

    Tensors may be on any device, of any shape; one at a time is copied to the host. Raises OSError.
    """
    # Wide elements first: every tensor then begins at a multiple of its element's size, also after an odd one.
    chunks = sorted(chunks, key=lambda chunk: -chunk[1].element_size())
    header: dict[str, object] = {}
    position = 0
    for key, tensor in chunks:
        end = position + tensor.numel() * tensor.element_size()
        code = DTYPES[_NAMES[tensor.dtype]][1]
        header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    digest = hashlib.sha256()
    size_bytes = 0
    with open(path, "xb") as stream:
        for piece in (len(text).to_bytes(8, "little"), text):
            size_bytes += stream.write(piece)
            digest.update(piece)
        for _, tensor in chunks:
            data = _bytes_of(tensor)
            for start in range(0, len(data), _PIECE_BYTES):
                piece_view = data[start : start + _PIECE_BYTES]
                size_bytes += stream.write(piece_view)
                digest.update(piece_view)
        stream.flush()
        os.fsync(stream.fileno())
    on_disk = os.stat(path).st_size
    if on_disk != size_bytes or size_bytes != 8 + len(text) + position:
        raise OSError(f"{path}: {on_disk:,} bytes on the disk of {8 + len(text) + position:,} written")
    return FileEntry(size_bytes=size_bytes, sha256=digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements' bytes (little endian on every machine torch runs on), not copied where they are on the host."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def header_problem(path: Path, expected: Mapping[str, tuple[str, Sequence[int]]]) -> str | None:
    """What in the file's own header contradicts `expected` (key -> dtype name, shape), or None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            keys = set(stream.keys())
            for key, (dtype, shape) in expected.items():
                if key not in keys:
                    return f"{key} is not in it"
                view = stream.get_slice(key)
                if list(view.get_shape()) != list(shape) or view.get_dtype() != DTYPES[dtype][1]:
                    return f"{key} is {view.get_dtype()} {view.get_shape()}, not {DTYPES[dtype][1]} {list(shape)}"
    except SafetensorError as error:
        return f"not a safetensors file ({error})"
    return None
