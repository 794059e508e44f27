"""Tokenizers: a byte-level BPE trained here, or one that exists, always kept as one `tokenizer.json`.

Documents are separated by the end-of-text token: `<|endoftext|>` for ours, the tokenizer's own otherwise. Special
tokens that stand in the text itself are encoded as plain text, so no document can forge a separator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainwright import storage
from trainwright.errors import DataError

__all__ = ["END_OF_TEXT", "TextTokenizer", "load_tokenizer", "train_byte_level_bpe"]

END_OF_TEXT = "<|endoftext|>"
_KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]", "[EOS]")
_MAX_JSON_BYTES = 256 << 20
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers.Tokenizer` and what the data room knows of it. V = `vocab_size` = the largest id + 1."""

    tokenizer: Any
    eos_token: str
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, int64 arrays; on all cores, while other threads run. Never the end-of-text token."""
        # Not encode_batch: it also computes every token's place in the text, which takes as long again.
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        result: list[Ids] = []
        for text, encoding in zip(texts, encoded, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            result.append(self._without_eos(text) if (ids == self.eos_id).any() else ids)
        return result

    def _without_eos(self, text: str) -> Ids:
        """Some models (Unigram) hold the separator as an ordinary piece: encode a text that spells it out in parts."""
        half = len(self.eos_token) // 2
        parts, start = [], 0
        while (found := text.find(self.eos_token, start)) >= 0:
            parts.append(text[start : found + half])
            start = found + half
        parts.append(text[start:])
        ids = np.array([token for part in parts for token in self.encode(part)], dtype=np.int64)
        return ids[ids != self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def to_json(self) -> bytes:
        """The content of its tokenizer.json."""
        return str(self.tokenizer.to_str(pretty=False)).encode()

    @property
    def sha256(self) -> str:
        """Hash of `to_json()`: two data sets with the same one have the same tokens."""
        return storage.sha256_bytes(self.to_json())


def _finish(tokenizer: Any, eos_token: str) -> TextTokenizer:
    # A tokenizer.json of a fine-tuned model often cuts at 512 tokens or pads; both would spoil a token stream.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    eos_id = tokenizer.token_to_id(eos_token)
    assert eos_id is not None, f"{eos_token!r} was checked to be in the vocabulary"
    return TextTokenizer(tokenizer, eos_token, eos_id, max(tokenizer.get_vocab().values()) + 1)


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE (Radford et al. 2019, GPT-2) of at most `vocab_size` entries, trained on `texts`.

    Every text can be encoded: the 256 bytes are in the vocabulary. A small sample gives fewer entries.
    """
    if not 257 <= vocab_size <= 1 << 24:
        raise DataError(
            f"a vocabulary of {vocab_size:,}",
            "a byte-level BPE has the 256 bytes, the end-of-text token and the merges: from 257 to 16,777,216 entries",
            "--vocab-size 8192",
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer, END_OF_TEXT)


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> TextTokenizer:
    """An existing tokenizer: `tokenizer.json`, a SentencePiece `.model`, or a folder with either or with GPT-2's
    `vocab.json` and `merges.txt` (also named by one of these two files).

    `eos_token` overrides the separator that the tokenizer's files name. Raises DataError if there is no tokenizer, it
    is damaged, or no separator is known.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    candidates = (
        [path] if path.is_file() else [path / name for name in ("tokenizer.json", "tokenizer.model", "spiece.model")]
    )
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None and found.name in ("vocab.json", "merges.txt"):
        found = None
    try:
        if found is not None and found.suffix == ".model":
            from trainwright.data.spm import convert_sentencepiece

            tokenizer, known_eos = convert_sentencepiece(found)
        elif found is not None:
            tokenizer, known_eos = _from_json(found), None
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer, known_eos = _from_gpt2_files(folder), END_OF_TEXT
        else:
            raise DataError(
                f"no tokenizer at {path}",
                "a tokenizer is a tokenizer.json, a SentencePiece .model, or a folder with one of these or with "
                "vocab.json and merges.txt",
                "--vocab-size 8192 trains one instead",
            )
    except DataError:
        raise
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise DataError(
            f"the tokenizer at {found or folder} cannot be read: {error}",
            "a tokenizer file is whole and of a known kind",
            "fetch or export it again",
        ) from error
    return _finish(tokenizer, _choose_eos(tokenizer, folder, eos_token, known_eos))


def _from_json(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(storage.read_bytes(path, _MAX_JSON_BYTES).decode())


def _from_gpt2_files(folder: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _choose_eos(tokenizer: Any, folder: Path, asked: str | None, known: str | None) -> str:
    vocabulary = tokenizer.get_vocab()
    if asked is not None:
        if asked not in vocabulary:
            raise DataError(
                f"end-of-text token {asked!r} is not in the vocabulary",
                "documents are separated by a token of the tokenizer",
                f"--eos-token {_special_tokens(tokenizer)[0]!r}" if _special_tokens(tokenizer) else "leave it out",
            )
        return asked
    names = [_declared_eos(folder), known, *_KNOWN_EOS]
    for name in names:
        if name is not None and name in vocabulary:
            return name
    specials = _special_tokens(tokenizer)
    raise DataError(
        f"no end-of-text token is known for this tokenizer (special tokens: {', '.join(specials) or 'none'})",
        "documents are separated by a token of the tokenizer",
        f"--eos-token {specials[0]!r}" if specials else "--eos-token with a token of its vocabulary",
    )


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]


def _declared_eos(folder: Path) -> str | None:
    """The eos token that a Hugging Face folder's own files name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = storage.read_json(folder / name).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None
