"""How `prepare` is asked to work, and what of it makes one data set different from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainwright import storage
from trainwright.data.manifest import FORMAT_VERSION
from trainwright.data.readers import PIECE_CHARACTERS
from trainwright.data.sources import SourceFile
from trainwright.errors import DataError

__all__ = ["DEFAULT_VOCAB_SIZE", "PrepareSettings", "content_settings", "identity"]

DEFAULT_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class PrepareSettings:
    """How text becomes tokens. `tokenizer`: path of an existing one; else a byte-level BPE of `vocab_size` (default
    8,192) is trained on at most `sample_bytes` of the training split. `held_out`: share of the documents, the last
    ones, kept from training. `text_key`: name of the text in records. `eos_token`: the separator of documents."""

    tokenizer: str | None = None
    vocab_size: int | None = None
    eos_token: str | None = None
    held_out: float = 0.05
    text_key: str = "text"
    shard_tokens: int = 1 << 25
    sample_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise DataError(
                f"tokenizer {self.tokenizer!r} and vocab_size {self.vocab_size}",
                "an existing tokenizer has its vocabulary; a size is for training a new one",
                "leave out --vocab-size",
            )
        if not 0 <= self.held_out < 1:
            raise DataError(f"held_out {self.held_out}", "a share of the documents, from 0 up to below 1", "0.05")
        if self.shard_tokens < 1 or self.sample_bytes < 1:
            raise DataError("shard_tokens or sample_bytes below 1", "both are sizes", "leave them out")


def content_settings(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that shape the content, as the manifest keeps them: no paths, so that they can be in the version."""
    trained = settings.tokenizer is None
    return {
        "vocab_size": (settings.vocab_size or DEFAULT_VOCAB_SIZE) if trained else None,
        "sample_bytes": settings.sample_bytes if trained else None,
        "held_out": settings.held_out,
        "text_key": settings.text_key,
        "shard_tokens": settings.shard_tokens,
        "piece_characters": PIECE_CHARACTERS,
    }


def identity(
    specs: Sequence[str], files: Sequence[SourceFile], settings: PrepareSettings, given_tokenizer_sha256: str | None
) -> dict[str, Any]:
    """What a resume must share with the run that it continues: the settings, the sources, and their files' sizes and
    times of change."""
    inputs = [[file.kind, file.name, file.size_bytes, file.stamp] for file in files]
    return {
        "format_version": FORMAT_VERSION,
        "sources": list(specs),
        "source_files": len(files),
        "source_files_sha256": storage.sha256_bytes(storage.canonical_json(inputs)),
        **content_settings(settings),
        "eos_token": settings.eos_token,
        "given_tokenizer_sha256": given_tokenizer_sha256,
    }
