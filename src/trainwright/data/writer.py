"""Writes the shards of a token data set, with a journal from which a killed `prepare` goes on.

Each finished shard is a line of `journal.jsonl`: its files with their hashes, the cursor of its last piece, and what
the stream carries across the cut (an open document's sizes, the problems met). A resume checks the files against
their hashes, keeps those up to the first that is not whole, and goes on behind the last one's cursor; since reading
and tokenizing are pure, the result is the same as that of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainwright import storage
from trainwright.data.manifest import FileEntry, Shard
from trainwright.data.readers import Cursor, Piece, Resume

__all__ = ["JOURNAL", "MOST_FILES", "Journal", "Progress", "ShardWriter"]

JOURNAL = "journal.jsonl"
_PART = ".part"
MOST_FILES = 10_000
"""Source files that a manifest names."""
_STEMS = ("tokens", "mask", "documents", "checksums")


@dataclass
class Progress:
    """Where the stream stands behind the last finished shard."""

    cursor: Cursor | None = None
    tokens: int = 0
    documents: int = 0
    open_bytes: int = 0
    open_counted: int = 0
    open_crc: int = 0
    documents_of_files: list[list[int]] = field(default_factory=list)
    """[source file, documents from it], in order."""
    problems: dict[str, int] = field(default_factory=dict)

    def count_document(self, file: int) -> None:
        """One document more from a source file; beyond MOST_FILES files nothing is told of them."""
        files = self.documents_of_files
        if not files or files[-1][0] != file:
            if len(files) > MOST_FILES:
                return
            files.append([file, 0])
        files[-1][1] += 1

    def resume(self) -> Resume | None:
        """From where the reader goes on; None at the beginning."""
        return Resume(self.cursor, self.problems) if self.cursor else None


class Journal:
    """`journal.jsonl`: a header that says what is being prepared, then a line a finished shard."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.folder = folder

    def read_header(self) -> dict[str, Any] | None:
        """The header, or None if there is no journal or not even its first line is whole."""
        lines = self._lines()
        return lines[0] if lines and lines[0].get("journal") == 1 else None

    def _lines(self) -> list[dict[str, Any]]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for raw in data.split(b"\n")[:-1]:  # what follows the last newline was cut off by the kill
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
        return lines

    def start(self, header: dict[str, Any]) -> None:
        """A new journal."""
        storage.atomic_write_bytes(self.path, storage.canonical_json({"journal": 1, **header}) + b"\n")

    def append(self, shard: Shard, progress: Progress) -> None:
        """Records a finished shard; on the disk when this returns."""
        line = storage.canonical_json({"shard": shard.model_dump(), "progress": asdict(progress)}) + b"\n"
        with open(self.path, "ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def recover(self) -> tuple[list[Shard], Progress]:
        """The finished shards whose files are whole, and where the stream stood; removes everything else."""
        shards: list[Shard] = []
        progress = Progress()
        lines = self._lines()
        for line in lines[1:]:
            try:
                shard = Shard.model_validate_json(storage.canonical_json(line["shard"]))
                found = Progress(**line["progress"])
                found.cursor = Cursor(*(found.cursor or ()))
            except (KeyError, TypeError, ValueError):
                break
            if not all(self._whole(entry) for entry in shard.files()):
                break
            shards.append(shard)
            progress = found
        kept = [storage.canonical_json(line) + b"\n" for line in lines[: 1 + len(shards)]]
        storage.atomic_write_bytes(self.path, b"".join(kept))
        self.remove_strays({entry.file for shard in shards for entry in shard.files()})
        return shards, progress

    def _whole(self, entry: FileEntry) -> bool:
        try:
            return FileEntry.of(self.folder, entry.file) == entry
        except OSError:
            return False

    def remove_strays(self, keep: set[str]) -> None:
        """Removes shard files (only such: by name) that are not in `keep`, and temporary files."""
        for stem in _STEMS:
            for path in [*self.folder.glob(f"{stem}-*.bin"), *self.folder.glob(f"{stem}-*.bin{_PART}")]:
                if path.name not in keep:
                    path.unlink()
        for path in self.folder.glob(".*.tmp"):
            path.unlink()


class ShardWriter:
    """Appends pieces to the stream and cuts it into shards of `shard_tokens` tokens or a piece more."""

    def __init__(self, journal: Journal, vocab_size: int, eos_id: int, shard_tokens: int) -> None:
        self.journal, self.folder = journal, journal.folder
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.shards, self.progress = journal.recover()
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._eos = np.array([eos_id], dtype=self.dtype).tobytes()
        self._begin()

    def _begin(self) -> None:
        number = len(self.shards)
        self._names = {stem: f"{stem}-{number:05d}.bin" for stem in _STEMS}
        self._stream = open(self.folder / (self._names["tokens"] + _PART), "wb", buffering=1 << 20)  # noqa: SIM115
        self._tokens = 0
        self._runs: list[tuple[int, bool]] = []  # the loss mask as (length, counted)
        self._documents = (array("Q"), array("Q"), array("Q"))  # ends, bytes, counted tokens
        self._checksums = array("I")

    def add(self, piece: Piece, ids: npt.NDArray[np.int64]) -> None:
        """Appends the tokens of `piece`, and the end-of-text token if its document ends."""
        assert not ids.size or ids.max() < self._vocab_size, "the tokenizer gave an id outside its vocabulary"
        progress = self.progress
        self._write(ids.astype(self.dtype).tobytes())
        self._count(len(ids), piece.counted)
        if piece.counted:
            progress.open_bytes += len(piece.text.encode())
        if piece.last:
            self._write(self._eos)
            self._count(1, True)
            for column, value in zip(
                self._documents, (progress.tokens, progress.open_bytes, progress.open_counted), strict=True
            ):
                column.append(value)
            self._checksums.append(progress.open_crc)
            progress.documents += 1
            progress.open_bytes = progress.open_counted = progress.open_crc = 0
            progress.count_document(piece.cursor.file)
        progress.cursor, progress.problems = piece.cursor, piece.problems
        if self._tokens >= self._shard_tokens:
            self._finish()
            self._begin()

    def _write(self, tokens: bytes) -> None:
        self._stream.write(tokens)
        self.progress.open_crc = zlib.crc32(tokens, self.progress.open_crc)

    def _count(self, tokens: int, counted: bool) -> None:
        self._tokens += tokens
        self.progress.tokens += tokens
        if counted:
            self.progress.open_counted += tokens
        if self._runs and self._runs[-1][1] == counted:
            self._runs[-1] = (self._runs[-1][0] + tokens, counted)
        elif tokens:
            self._runs.append((tokens, counted))

    def close(self) -> list[Shard]:
        """Finishes the last shard; returns all."""
        if self._tokens:
            self._finish()
        else:
            self.abort()
        return self.shards

    def abort(self) -> None:
        """Drops the unfinished shard."""
        self._stream.close()
        (self.folder / (self._names["tokens"] + _PART)).unlink(missing_ok=True)

    def _finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        names = self._names
        os.replace(self.folder / (names["tokens"] + _PART), self.folder / names["tokens"])
        masked = any(not counted for _, counted in self._runs)
        if masked:
            with storage.atomic_write(self.folder / names["mask"]) as stream:
                for length, counted in self._runs:
                    stream.write((b"\1" if counted else b"\0") * length)
        columns = [np.frombuffer(column, dtype=np.uint64).astype("<u8").tobytes() for column in self._documents]
        storage.atomic_write_bytes(self.folder / names["documents"], b"".join(columns))
        checksums = np.array(self._checksums, dtype="<u4").tobytes()
        storage.atomic_write_bytes(self.folder / names["checksums"], checksums)
        shard = Shard(
            tokens=FileEntry.of(self.folder, names["tokens"]),
            mask=FileEntry.of(self.folder, names["mask"]) if masked else None,
            documents=FileEntry.of(self.folder, names["documents"]),
            num_tokens=self._tokens,
            num_documents=len(self._documents[0]),
            checksums=FileEntry.of(self.folder, names["checksums"]),
        )
        self.journal.append(shard, self.progress)
        self.shards.append(shard)
