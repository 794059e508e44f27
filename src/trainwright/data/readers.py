"""Reads sources into documents, and documents into pieces small enough to hold, whatever their size.

A text file is decoded in chunks, so a document may be larger than memory. Pieces are cut before white space that
follows a letter or digit: there every usual pre-tokenizer cuts too, so the tokens are those of the whole document.
What is wrong with the text (broken UTF-8, empty or binary files, bad records) is counted, named and survived.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

from trainwright import storage
from trainwright.data.sources import SourceFile
from trainwright.errors import DataError

__all__ = ["MAX_RECORD_BYTES", "PIECE_CHARACTERS", "Cursor", "Piece", "ReadState", "Resume", "iterate_pieces"]

PIECE_CHARACTERS = 16_384
"""Longest piece that is tokenized in one go."""
MAX_RECORD_BYTES = 64 << 20
"""Longest JSONL line: JSON cannot be parsed in pieces, so a longer record is skipped and counted."""
_CHUNK_BYTES = 1 << 20
_BOUNDARY_SEARCH = 1024


class Cursor(NamedTuple):
    """A piece's place: file, document in the file, piece in the document, all counted from 0."""

    file: int
    document: int
    piece: int


class Piece(NamedTuple):
    """A run of text of one document. `counted`: part of the loss; `last`: the document ends here. `problems`: the
    counts at this point, for the journal."""

    text: str
    counted: bool
    last: bool
    cursor: Cursor
    problems: dict[str, int]


class Resume(NamedTuple):
    """Where an earlier pass stood: its last piece, and the problems counted up to it."""

    cursor: Cursor
    problems: dict[str, int]


class Part(NamedTuple):
    """A run of a document's text as the reader found it, of any length."""

    text: str
    counted: bool


PROBLEMS = {
    "broken_utf8": "byte sequences that are not UTF-8, each replaced by U+FFFD",
    "empty": "documents without text, left out",
    "binary": "files with binary content, left out",
    "bad_records": "records without a usable text (or prompt and completion), left out",
    "oversized": f"JSONL records over {MAX_RECORD_BYTES >> 20} MiB, left out",
}


@dataclass
class ReadState:
    """What a reader has met so far: bytes read, problems by kind (keys of PROBLEMS), the first name of each kind."""

    text_key: str = "text"
    read_bytes: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def count(self, problem: str, name: str, number: int = 1) -> None:
        """Counts `number` problems of a kind in the source `name`."""
        assert problem in PROBLEMS, f"unknown problem {problem!r}"
        # A new dict: pieces hold the old one as their snapshot.
        self.problems = {**self.problems, problem: self.problems.get(problem, 0) + number}
        self.examples.setdefault(problem, name)

    def notes(self) -> list[str]:
        """One line a kind of problem, for people."""
        return [
            f"{number:,} {PROBLEMS[problem]} (first: {self.examples.get(problem, 'before the resume')})"
            for problem, number in sorted(self.problems.items())
        ]


def iterate_pieces(files: Sequence[SourceFile], state: ReadState, after: Resume | None = None) -> Iterator[Piece]:
    """The pieces of all documents of `files`, in order, holding a few MiB whatever their size.

    With `after`, starts behind that piece, as an earlier pass over the same files left it. Raises DataError for a
    file that cannot be read, or that does not hold that piece any more.
    """
    for number, file in enumerate(files):
        start = state.read_bytes
        if after is None or number >= after.cursor.file:
            try:
                yield from _file_pieces(number, file, state, after if after and after.cursor.file == number else None)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(
                    f"{file.name} cannot be read: {error}", "every source can be read to its end", "check the file"
                ) from error
        state.read_bytes = start + file.size_bytes


def _file_pieces(number: int, file: SourceFile, state: ReadState, after: Resume | None) -> Iterator[Piece]:
    waiting = after is not None
    for index, parts in enumerate(_documents(file, state)):
        if after is not None and index < after.cursor.document:
            for _ in parts:
                pass
            continue
        for piece in _pieces(parts, Cursor(number, index, 0), file.name, state):
            if not waiting:
                yield piece
            elif after is not None and piece.cursor == after.cursor:
                # What the skipped part held was counted by the earlier pass.
                waiting, state.problems = False, after.problems
    if waiting:
        raise DataError(
            f"{file.name} is not what it was when this prepare began",
            "a prepare goes on with the text that it began with",
            "--overwrite to begin again",
        )


def _pieces(parts: Iterator[Part], at: Cursor, name: str, state: ReadState) -> Iterator[Piece]:
    held: tuple[str, bool] | None = None  # one piece is held back: only the end of `parts` tells which is the last
    count, problems = 0, state.problems
    for text, counted in _cut(parts):
        if held is not None:
            yield Piece(*held, False, at._replace(piece=count), state.problems)
            count += 1
        held = (text, counted)
    if held is None or (count == 0 and not held[0].strip()):
        if state.problems is problems:  # else it was counted as what it is: binary, or a bad record
            state.count("empty", name)
    else:
        yield Piece(*held, True, at._replace(piece=count), state.problems)


def _cut(parts: Iterator[Part]) -> Iterator[tuple[str, bool]]:
    """Parts joined and cut to PIECE_CHARACTERS; where the parts were cut does not change where the pieces are."""
    rest, kind = "", True
    for text, counted in parts:
        if rest and counted != kind:
            yield rest, kind
            rest = ""
        text, kind, start = rest + text, counted, 0
        while len(text) - start > PIECE_CHARACTERS:
            end = _boundary(text, start, start + PIECE_CHARACTERS)
            yield text[start:end], kind
            start = end
        rest = text[start:]
    if rest:
        yield rest, kind


def _boundary(text: str, start: int, limit: int) -> int:
    """Where to cut text[start:limit] (text[limit] exists): before a space behind a letter or digit, if near."""
    for end in range(limit, max(start, limit - _BOUNDARY_SEARCH), -1):
        if text[end].isspace() and text[end - 1].isalnum():
            return end
    for mark in (" ", "\n"):
        end = text.rfind(mark, start + 1, limit + 1)
        if end > start:
            return end
    return limit


def _documents(file: SourceFile, state: ReadState) -> Iterator[Iterator[Part]]:
    if file.kind == "text":
        yield _text_parts(file, state)
    elif file.kind == "jsonl":
        yield from (_record_parts(record, file.name, state) for record in _jsonl_records(file, state))
    else:
        from trainwright.data import tables

        rows = (
            tables.parquet_records(file, state) if file.kind == "parquet" else tables.huggingface_records(file, state)
        )
        yield from (_record_parts(record, file.name, state) for record in rows)


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[IO[bytes]]:
    with storage.open_read(file.path) as stream:
        if file.path.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield cast(IO[bytes], unpacked)
        else:
            yield stream


def _text_parts(file: SourceFile, state: ReadState) -> Iterator[Part]:
    pending, first = b"", True
    with _open(file) as stream:
        while True:
            chunk = stream.read(_CHUNK_BYTES)
            if first and b"\0" in chunk[:8192]:
                state.count("binary", file.name)
                return
            state.read_bytes += len(chunk)
            text, pending = decode(pending + chunk, file.name, state, final=not chunk)
            if text:
                yield Part(text.removeprefix("\ufeff") if first else text, True)
                first = False
            if not chunk:
                return


def decode(data: bytes, name: str, state: ReadState, final: bool = True) -> tuple[str, bytes]:
    """UTF-8 `data` as text, and the bytes of a character cut off at its end (none if `final`). Counts the broken."""
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError:
        text, used = codecs.utf_8_decode(data, "replace", final)
        state.count("broken_utf8", name, text.count("\ufffd") - data[:used].count("\ufffd".encode()))
    return text, data[used:]


def _jsonl_records(file: SourceFile, state: ReadState) -> Iterator[Any]:
    with _open(file) as stream:
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            state.read_bytes += len(line)
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_CHUNK_BYTES)
                    state.read_bytes += len(line)
                state.count("oversized", file.name)
                continue
            text, _ = decode(line, file.name, state)
            text = text.strip().removeprefix("\ufeff")
            if text:
                try:
                    yield json.loads(text)
                except (ValueError, RecursionError):
                    state.count("bad_records", file.name)


def _record_parts(record: Any, name: str, state: ReadState) -> Iterator[Part]:
    """The parts of a record {text} or {prompt, completion}; a prompt is not part of the loss."""
    parts: list[Part] | None = None
    if isinstance(record, dict):
        text, prompt, completion = (record.get(key) for key in (state.text_key, "prompt", "completion"))
        if isinstance(prompt, str) and isinstance(completion, str):
            parts = [Part(prompt, False), Part(completion, True)] if completion.strip() else []
        elif isinstance(text, str):
            parts = [Part(text, True)]
    if parts is None:
        state.count("bad_records", name)
        return
    for text, counted in parts:
        yield Part(_without_surrogates(text, name, state), counted)


def _without_surrogates(text: str, name: str, state: ReadState) -> str:
    """JSON's "\\ud800" makes a string that is no text; such halves are replaced as broken bytes are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        state.count("broken_utf8", name, sum("\ud800" <= character <= "\udfff" for character in text))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
