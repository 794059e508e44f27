"""The versioned token data set, read through memory maps: `TokenDataset` and its splits.

Legend: T tokens a sequence, V vocabulary. The format is in `manifest.py`; `prepare.py` writes it.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainwright import storage
from trainwright.data.manifest import MANIFEST, Manifest, Split, read_manifest
from trainwright.data.order import Order, SampleOrder
from trainwright.data.remote import local_copy
from trainwright.data.tokenize import TextTokenizer, load_tokenizer
from trainwright.errors import DataError

__all__ = ["SplitName", "TokenDataset", "TokenSplit", "check", "describe"]

SplitName = Literal["train", "held_out"]
Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint8]


class _Stream:
    """All shards as one stream of tokens and one list of document ends."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.vocab_size = manifest.vocab_size
        self.folder = folder
        token_dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
        self.tokens = [self._map(shard.tokens.file, token_dtype) for shard in manifest.shards]
        self.masks = [self._map(shard.mask.file, np.dtype("u1")) if shard.mask else None for shard in manifest.shards]
        indexes = [self._map(shard.documents.file, np.dtype("<u8")) for shard in manifest.shards]
        self.document_ends = [index[: index.size // 3] for index in indexes]
        self.starts = np.cumsum([0, *(shard.num_tokens for shard in manifest.shards)])
        self.first_documents = np.cumsum([0, *(shard.num_documents for shard in manifest.shards)])

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = self.folder / name
        if not path.stat().st_size:
            return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
        # asarray: a plain view of the map, so that slicing makes no memmap objects.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def document_at(self, token: int, shard: int) -> int:
        """Number of the document that the token at a stream position, in `shard`, belongs to."""
        # The document ends behind its last token: in this shard, or it is the first to end in a later one.
        inside = np.searchsorted(self.document_ends[shard], np.uint64(token), side="right")
        return int(self.first_documents[shard] + inside)

    def start_of(self, document: int, shard: int) -> int:
        """Stream position of the first token of a document that ends in `shard`."""
        inside = document - int(self.first_documents[shard])
        while inside == 0 and shard > 0:  # behind the last document that ends before
            shard -= 1
            inside = len(self.document_ends[shard])
        return int(self.document_ends[shard][inside - 1]) if inside else 0

    def stored(self, start: int, end: int) -> bytes:
        """The bytes of the tokens [start, end), as they are stored."""
        parts = []
        for shard, tokens in enumerate(self.tokens):
            first, last = int(self.starts[shard]), int(self.starts[shard + 1])
            if first < end and start < last:
                parts.append(tokens[max(start - first, 0) : end - first].tobytes())
        return b"".join(parts)

    def read(self, start: int, length: int) -> tuple[Tokens, Mask | None, Tokens]:
        tokens, documents = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
        mask: Mask | None = None
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        done = 0
        while done < length:
            at = start + done
            inside = at - int(self.starts[shard])
            take = min(length - done, int(self.starts[shard + 1]) - at)
            tokens[done : done + take] = self.tokens[shard][inside : inside + take]
            shard_mask = self.masks[shard]
            if shard_mask is not None:
                mask = np.ones(length, dtype=np.uint8) if mask is None else mask
                mask[done : done + take] = shard_mask[inside : inside + take]
            self._number_documents(documents[done : done + take], at, shard)
            done += take
            shard += 1
        if length and (highest := int(tokens.max())) >= self.vocab_size:
            raise DataError(
                f"token {highest} near position {start} of {self.folder}",
                f"tokens are smaller than the vocabulary, {self.vocab_size}",
                f"trainwright data check {self.folder} names the damaged file",
            )
        return tokens, mask, documents

    def _number_documents(self, out: Tokens, at: int, shard: int) -> None:
        first, last = self.document_at(at, shard), self.document_at(at + len(out) - 1, shard)
        if first == last:
            out.fill(first)
            return
        offset = int(self.first_documents[shard])
        ends = self.document_ends[shard][first - offset : last - offset].astype(np.int64)
        out[:] = first + np.searchsorted(ends, np.arange(at, at + len(out)), side="right")


class TokenSplit:
    """A split of a token data set as one stream of tokens."""

    def __init__(self, stream: _Stream, split: Split, name: SplitName, version: str) -> None:
        self._stream, self._split = stream, split
        self.name, self.version, self.vocab_size = name, version, stream.vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens, separators included."""
        return self._split.num_tokens

    @property
    def num_counted(self) -> int:
        """Tokens that are part of the loss (all, but for masked prompts)."""
        return self._split.num_counted

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the counted text: bits per byte = nats a token x num_counted / num_bytes / ln 2."""
        return self._split.num_bytes

    @property
    def num_documents(self) -> int:
        """Documents."""
        return self._split.num_documents

    def num_sequences(self, sequence_length: int) -> int:
        """Packed sequences of T tokens, each with a token to predict behind its last: (num_tokens - 1) // T."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    @property
    def documents_of_set(self) -> int:
        """Documents of all splits of its data set: they are numbered through."""
        return int(self._stream.first_documents[-1])

    def sequence_start(self, sample: int, sequence_length: int) -> int:
        """The token that sample `sample` of T tokens begins with."""
        return sample * sequence_length

    def order(self, sequence_length: int, seed: int, shuffle: bool) -> Order:
        """The order of training over its sequences of T tokens."""
        return SampleOrder(self.num_sequences(sequence_length), version=self.version, seed=seed, shuffle=shuffle)

    def read(self, start: int, length: int) -> tuple[Tokens, Mask | None, Tokens]:
        """Tokens [length] int64 from `start` of the split, their loss mask [length] uint8 (None: all count) and the
        number of the document of each [length] int64. Raises ValueError outside the split, DataError for damage."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise ValueError(f"[{start}, {start + length}) is not inside the {self.num_tokens} tokens of {self.name}")
        return self._stream.read(self._split.first_token + start, length)


class TokenDataset:
    """A token data set on disk. Open it with `TokenDataset.open(path)`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.path, self.manifest = folder, manifest
        self._stream = _Stream(folder, manifest)

    @staticmethod
    def open(path: str | Path, cache: str | Path | None = None) -> TokenDataset:
        """Reads the manifest, compares the files' sizes and maps them; hashing is left to `check`.

        path: a folder, or a URL such as `s3://bucket/plays`: its files are downloaded to `cache` first (`remote.py`).
        Raises DataError for a missing, unfinished, damaged or inconsistent data set, StorageError for a store.
        """
        folder = local_copy(os.fspath(path), cache) if storage.is_url(path) else Path(path).expanduser()
        manifest = read_manifest(folder)
        for entry in manifest.files():
            _check_size(folder, entry.file, entry.bytes)
        return TokenDataset(folder, manifest)

    @property
    def version(self) -> str:
        """The data set's version: 64 hexadecimal digits that change with any token, split or the tokenizer."""
        return self.manifest.version

    @property
    def vocab_size(self) -> int:
        """V: largest token id + 1 that the tokenizer knows."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """The token between documents."""
        return self.manifest.eos_id

    @property
    def tokenizer_path(self) -> Path:
        """Its tokenizer.json."""
        return self.path / self.manifest.tokenizer.file

    def load_tokenizer(self) -> TextTokenizer:
        """The tokenizer that the text was encoded with."""
        return load_tokenizer(self.tokenizer_path, self.manifest.eos_token)

    def document_name(self, number: int) -> str:
        """Document `number` (from 0, over all splits), with the source file it came from where the manifest tells."""
        return document_name(self.manifest, number)

    def split(self, name: SplitName) -> TokenSplit:
        """`train` or `held_out` (which may be empty)."""
        if name not in ("train", "held_out"):
            raise DataError(f"split {name!r}", "the splits are train and held_out", "train")
        return TokenSplit(self._stream, getattr(self.manifest.splits, name), name, self.version)


def _check_size(folder: Path, name: str, expected_bytes: int) -> None:
    try:
        found = storage.size_bytes(folder / name)
    except OSError as error:
        raise DataError(
            f"{folder / name} is missing or cannot be read: {error}",
            f"every file that {MANIFEST} lists is there",
            "copy the data set again, or prepare it again",
        ) from None
    if found != expected_bytes:
        raise DataError(
            f"{folder / name} has {found:,} bytes",
            f"{MANIFEST} says {expected_bytes:,} bytes",
            "copy the data set again, or prepare it again",
        )


def check(path: str | Path) -> Manifest:
    """Hashes every file of a data set again. Raises DataError naming the first file that is not what was written."""
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    for entry in manifest.files():
        _check_size(folder, entry.file, entry.bytes)
        if (found := storage.sha256_file(folder / entry.file)) != entry.sha256:
            raise DataError(
                f"{folder / entry.file} has the SHA-256 {found}{damaged_document(folder, manifest, entry.file)}",
                f"{MANIFEST} says {entry.sha256}",
                "copy the data set again, or prepare it again",
            )
    return manifest


def damaged_document(folder: Path, manifest: Manifest, name: str) -> str:
    """For a tokens file that is not what was written: the first document in it whose tokens are not; empty where that
    cannot be told."""
    number = next((i for i, shard in enumerate(manifest.shards) if shard.tokens.file == name), None)
    if number is None or any(shard.checksums is None for shard in manifest.shards):
        return ""
    stream = _Stream(folder, manifest)
    shards = range(number, min(number + 2, len(manifest.shards)))  # a document may end in the next one
    for shard in shards:
        entry = manifest.shards[shard].checksums
        assert entry is not None, "looked at above"
        expected = np.fromfile(folder / entry.file, dtype="<u4")
        first = int(stream.first_documents[shard])
        for index, checksum in enumerate(expected):
            start = stream.start_of(first + index, shard)
            if zlib.crc32(stream.stored(start, int(stream.document_ends[shard][index]))) != checksum:
                return f"; the first damaged document is {document_name(manifest, first + index)}"
    return ""


def document_name(manifest: Manifest, number: int) -> str:
    """Document `number` of the stream (from 0), with the source file it came from where the manifest tells."""
    before = 0
    files = manifest.provenance.get("files")
    for entry in files if isinstance(files, list) else ():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], int)):
            break
        if number < before + entry[1]:
            inside = f", record {number - before + 1} of {entry[1]:,} in it" if entry[1] > 1 else ""
            return f"{number} ({str(entry[0])[:200]}{inside})"
        before += entry[1]
    return str(number)


def describe(path: str | Path) -> dict[str, Any]:
    """What `trainwright data show` prints: version, sizes, splits, tokenizer, problems and where the text came from."""
    dataset = TokenDataset.open(path)
    manifest = dataset.manifest
    splits = {}
    for split in (dataset.split("train"), dataset.split("held_out")):
        splits[split.name] = {
            "documents": split.num_documents,
            "tokens": split.num_tokens,
            "tokens_in_loss": split.num_counted,
            "text_bytes": split.num_bytes,
            "bytes_per_token": round(split.num_bytes / split.num_counted, 3) if split.num_counted else None,
        }
    return {
        "path": str(dataset.path),
        "version": dataset.version,
        "format_version": manifest.format_version,
        "vocab_size": dataset.vocab_size,
        "dtype": manifest.dtype,
        "end_of_text": {"token": manifest.eos_token, "id": manifest.eos_id},
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "splits": splits,
        "shards": len(manifest.shards),
        "disk_bytes": sum(entry.bytes for entry in manifest.files()),
        "has_loss_mask": any(shard.mask is not None for shard in manifest.shards),
        "problems": dict(manifest.problems),
        "settings": dict(manifest.settings),
        "provenance": dict(manifest.provenance),
    }
