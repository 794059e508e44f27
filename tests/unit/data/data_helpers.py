"""Small token data sets for the tests of the data room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.data import PrepareResult, PrepareSettings, TokenDataset, prepare

SPEECH = (
    "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows of "
    "outrageous fortune or to take arms against a sea of troubles and by opposing end them"
)
WORDS = SPEECH.split()


def make_text(number: int, words: int = 120) -> str:
    """A text that is its own: words picked by a fixed rule."""
    picked = [WORDS[(number * 7 + place * place + place * number) % len(WORDS)] for place in range(words)]
    lines = [" ".join(picked[start : start + 9]) for start in range(0, words, 9)]
    return f"Text {number}.\n\n" + "\n".join(lines) + "\n"


def write_texts(folder: Path, count: int, words: int = 120) -> Path:
    """A folder of `count` text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"text-{number:03d}.txt").write_text(make_text(number, words), "utf-8")
    return folder


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """A JSONL file of `records`."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def quick_prepare(source: Path | str, out: Path, **settings: Any) -> PrepareResult:
    """`prepare` with a small vocabulary and no output."""
    if "tokenizer" not in settings:
        settings.setdefault("vocab_size", 300)
    return prepare(str(source), out, PrepareSettings(**settings), progress=False)


def stream(folder: Path) -> list[int]:
    """All tokens, training split first."""
    dataset = TokenDataset.open(folder)
    return [
        token
        for name in ("train", "held_out")
        for token in dataset.split(name).read(0, dataset.split(name).num_tokens)[0].tolist()  # type: ignore[arg-type]
    ]


def documents_of(folder: Path) -> list[str]:
    """The text of each document, decoded."""
    dataset = TokenDataset.open(folder)
    tokenizer, texts, current = dataset.load_tokenizer(), [], []
    for token in stream(folder):
        if token == dataset.eos_id:
            texts.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert not current, "the stream ends with a separator"
    return texts
