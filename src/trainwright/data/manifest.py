"""The manifest of a token data set: what every file is, and the version that stands for all of it.

    {"format": "trainwright-tokens", "format_version": 1, "version": SHA-256 of all but `version` and `provenance`,
     "dtype": "uint16" | "uint32", "vocab_size": V, "eos_id": …, "eos_token": …,
     "tokenizer": {"file", "bytes", "sha256"}, "settings": {…}, "problems": {kind: count},
     "shards": [{"tokens": {"file", "bytes", "sha256"}, "mask": {…} | null, "documents": {…},
                 "checksums": {…} | null, "num_tokens", "num_documents"}, …],
     "splits": {"train" | "held_out": {"first_token", "num_tokens", "num_counted", "first_document",
                "num_documents", "num_bytes"}},
     "provenance": {…}}

The shards are one stream of documents, each followed by the end-of-text token; a split is a range of that stream.
A shard's documents file is uint64 little endian, [3, num_documents] for the documents that end in it: the end in the
stream (separator included), bytes of counted text (UTF-8), counted tokens. A mask is uint8, 0 = not counted; absent
where all count. A checksums file is uint32, the CRC-32 of each of these documents' tokens as they are stored: with it
`check` names the damaged document. Provenance says, for up to 10,000 source files, how many documents each gave. Sources
and program versions are `provenance`: the same content has the same version wherever it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainwright import storage
from trainwright.errors import DataError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_MANIFEST_BYTES",
    "FileEntry",
    "Manifest",
    "Shard",
    "Split",
    "Splits",
    "cut_splits",
    "parse_manifest",
    "read_manifest",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
Count = Annotated[int, Field(ge=0, lt=1 << 60)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Part):
    """A file of the data set: a name inside its folder, its size and its hash."""

    file: str
    bytes: Count
    sha256: Sha256

    @model_validator(mode="after")
    def _inside(self) -> FileEntry:
        storage.safe_relative(self.file)
        return self

    @staticmethod
    def of(folder: Path, name: str) -> FileEntry:
        """The entry of an existing file."""
        return FileEntry(file=name, bytes=storage.size_bytes(folder / name), sha256=storage.sha256_file(folder / name))


class Shard(_Part):
    """A piece of the token stream, with the index of the documents that end in it."""

    tokens: FileEntry
    mask: FileEntry | None
    documents: FileEntry
    num_tokens: Count
    num_documents: Count
    checksums: FileEntry | None = None
    """Absent in data sets that earlier versions wrote."""

    def files(self) -> list[FileEntry]:
        """The shard's own."""
        return [entry for entry in (self.tokens, self.mask, self.documents, self.checksums) if entry]


class Split(_Part):
    """A range of the stream: whole documents. `num_counted`: tokens in the loss; `num_bytes`: their text in UTF-8."""

    first_token: Count
    num_tokens: Count
    num_counted: Count
    first_document: Count
    num_documents: Count
    num_bytes: Count


class Splits(_Part):
    """The two splits, by document."""

    train: Split
    held_out: Split


class Manifest(_Part):
    """`manifest.json`, as the module's docstring draws it."""

    format: Literal["trainwright-tokens"] = "trainwright-tokens"
    format_version: int
    version: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(gt=0, le=1 << 32)]
    eos_id: Count
    eos_token: str
    tokenizer: FileEntry
    settings: dict[str, Any]
    problems: dict[str, Count]
    shards: tuple[Shard, ...] = Field(min_length=1)
    splits: Splits
    provenance: dict[str, Any]

    @property
    def itemsize(self) -> int:
        """Bytes a token."""
        return 2 if self.dtype == "uint16" else 4

    def content_version(self) -> str:
        """SHA-256 over the canonical JSON of everything but `version`, `provenance` and the documents' checksums."""
        content = self.model_dump(exclude={"version": True, "provenance": True, "shards": {"__all__": {"checksums"}}})
        return storage.sha256_bytes(storage.canonical_json(content))

    def files(self) -> list[FileEntry]:
        """Every file of the data set but the manifest."""
        return [self.tokenizer, *(entry for shard in self.shards for entry in shard.files())]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        def need(truth: bool, rule: str) -> None:
            if not truth:
                raise ValueError(rule)

        for shard in self.shards:
            need(shard.tokens.bytes == shard.num_tokens * self.itemsize, "tokens files are as long as num_tokens says")
            need(shard.mask is None or shard.mask.bytes == shard.num_tokens, "mask files have a byte a token")
            need(shard.documents.bytes == shard.num_documents * 24, "documents files have 24 bytes a document")
            sums = shard.checksums
            need(sums is None or sums.bytes == shard.num_documents * 4, "checksums files have 4 bytes a document")
            need(shard.num_tokens > 0, "a shard holds tokens")
        tokens, documents = (
            sum(getattr(shard, name) for shard in self.shards) for name in ("num_tokens", "num_documents")
        )
        train, held_out = self.splits.train, self.splits.held_out
        need(train.first_token == 0 and train.first_document == 0, "the training split comes first")
        need(held_out.first_token == train.num_tokens, "the held-out split follows the training split")
        need(held_out.first_document == train.num_documents, "the held-out split follows the training split")
        need(train.num_tokens + held_out.num_tokens == tokens, "the splits hold all tokens")
        need(train.num_documents + held_out.num_documents == documents, "the splits hold all documents")
        for split in (train, held_out):
            need(split.num_counted <= split.num_tokens, "no more tokens are counted than there are")
        need(self.eos_id < self.vocab_size, "eos_id is in the vocabulary")
        need(self.dtype == "uint32" or self.vocab_size <= 1 << 16, "uint16 holds a vocabulary of at most 65,536")
        names = [entry.file for entry in self.files()]
        need(len(set(names)) == len(names), "every file has a name of its own")
        return self


def cut_splits(folder: Path, shards: Sequence[Shard], first_held_out: int) -> Splits:
    """The splits of the stream in `shards`: documents before `first_held_out`, and from it on."""
    sums = np.zeros((2, 2), dtype=np.int64)  # [split, (bytes, counted tokens)]
    boundary, before = 0, 0
    for shard in shards:
        ends, *columns = np.fromfile(folder / shard.documents.file, dtype="<u8").reshape(3, -1)
        cut = min(max(first_held_out - before, 0), shard.num_documents)
        if cut:
            boundary = int(ends[cut - 1])
        sums[0] += [int(column[:cut].sum()) for column in columns]
        sums[1] += [int(column[cut:].sum()) for column in columns]
        before += shard.num_documents
    tokens = sum(shard.num_tokens for shard in shards)

    def split(index: int, token_range: tuple[int, int], document_range: tuple[int, int]) -> Split:
        return Split(
            first_token=token_range[0],
            num_tokens=token_range[1] - token_range[0],
            num_counted=int(sums[index, 1]),
            first_document=document_range[0],
            num_documents=document_range[1] - document_range[0],
            num_bytes=int(sums[index, 0]),
        )

    return Splits(
        train=split(0, (0, boundary), (0, first_held_out)),
        held_out=split(1, (boundary, tokens), (first_held_out, before)),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commits the data set: its files are on the disk already, this rename makes it exist."""
    storage.fsync_dir(folder)
    storage.atomic_write_json(folder / MANIFEST, manifest.model_dump())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the data set in `folder`. Raises DataError if missing, damaged, newer or inconsistent."""
    remedy = f"trainwright prepare SOURCE... --out {folder}"
    try:
        data = storage.read_bytes(folder / MANIFEST, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        unfinished = (folder / "journal.jsonl").exists()
        raise DataError(
            f"{folder} holds an unfinished data set" if unfinished else f"no token data set at {folder}",
            f"a token data set is a folder with a {MANIFEST}, as `trainwright prepare` writes it",
            "run the same prepare command again, it continues" if unfinished else remedy,
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}", "the manifest is JSON", remedy) from error
    return parse_manifest(data, str(folder))


def parse_manifest(content: bytes, folder: str) -> Manifest:
    """The manifest in `content`, of the data set at `folder` (a path or a URL). Raises DataError."""
    remedy = f"trainwright prepare SOURCE... --out {folder}"
    try:
        data = storage.parse_json(content, f"{folder}/{MANIFEST}")
    except ValueError as error:
        raise DataError(f"{folder}/{MANIFEST} cannot be read: {error}", "the manifest is JSON", remedy) from error
    found = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise DataError(
            f"{folder} is a token data set of format version {found}",
            f"this version of Trainwright reads format version {FORMAT_VERSION}",
            "prepare it again, or install the version that wrote it",
        )
    try:
        manifest = Manifest.model_validate_json(storage.canonical_json(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(item) for item in first["loc"]) or MANIFEST
        raise DataError(
            f"the manifest of {folder} is damaged: {place}: {first['msg']}", "the manifest follows its format", remedy
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the manifest of {folder} is damaged: {error}", "it follows its format", remedy) from error
    if manifest.version != manifest.content_version():
        raise DataError(
            f"the manifest of {folder} was changed after it was written",
            "the version is the SHA-256 of the manifest's content",
            remedy,
        )
    return manifest
