"""A SentencePiece `.model` (Unigram or BPE; Kudo & Richardson 2018) as a `tokenizers.Tokenizer`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from trainwright import storage
from trainwright.errors import DataError

__all__ = ["convert_sentencepiece"]

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
_MAX_MODEL_BYTES = 256 << 20
Pieces = list[tuple[str, float]]


def convert_sentencepiece(path: Path) -> tuple[Any, str | None]:
    """The tokenizer of a SentencePiece model, and the text of its end-of-text piece (None if it has none).

    Raises DataError for a model type that is neither Unigram nor BPE, or without the extra `hf`.
    """
    from tokenizers import AddedToken

    model = _parse(path)
    trainer = model.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    # Control pieces (<s>, </s>) have no merges: text that spells one out must not become one.
    mergeable = [(piece.piece, piece.score) for piece in model.pieces if piece.type not in (_CONTROL, _USER_DEFINED)]
    tokenizer = _model(trainer, pieces, mergeable, path)
    for piece in model.pieces:
        if piece.type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False)])
    _around(tokenizer, model, pieces)
    eos = pieces[trainer.eos_id][0] if 0 <= trainer.eos_id < len(pieces) else None
    return tokenizer, eos


def _parse(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # protobuf's C types on newer Pythons
            from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise DataError(
            f"{path.name} is a SentencePiece model and the packages sentencepiece and protobuf are not installed",
            "SentencePiece models need the extra `hf`",
            "pip install 'trainwright[hf]'",
        ) from None
    model: Any = vars(sentencepiece_model_pb2)["ModelProto"]()  # made at run time: unknown to type checkers
    model.ParseFromString(storage.read_bytes(path, _MAX_MODEL_BYTES))
    if not model.pieces:
        raise DataError(f"{path} holds no pieces", "a SentencePiece model has a vocabulary", "fetch it again")
    return model


def _model(trainer: Any, pieces: Pieces, mergeable: Pieces, path: Path) -> Any:
    from tokenizers import Tokenizer, models

    if trainer.model_type == _UNIGRAM:
        return Tokenizer(models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    if trainer.model_type == _BPE:
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        return Tokenizer(
            models.BPE(
                vocabulary,
                _merges(mergeable, vocabulary),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    raise DataError(
        f"{path} is a SentencePiece model of type {trainer.model_type}",
        "the types Unigram (1) and BPE (2) are read",
        "--vocab-size 8192 trains a tokenizer instead",
    )


def _merges(pieces: Pieces, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece's BPE merges the pair whose joined piece scores best; the same as a ranked list of merges."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _around(tokenizer: Any, model: Any, pieces: Pieces) -> None:
    """Normalizer, pre-tokenizer and decoder that do what SentencePiece does around its model."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if not any(_SPACE in piece[1:] for piece, _ in pieces):
        # No piece crosses a space: cutting there first changes nothing and lets the model's cache of words work.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never")
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
