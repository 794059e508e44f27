"""Which documents are held out, a bounded sample of the others, and batches of pieces."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence

from trainwright.data.progress import ProgressReport
from trainwright.data.readers import Piece, ReadState, iterate_pieces
from trainwright.data.sources import SourceFile

__all__ = ["batches", "held_out_documents", "sample_texts"]

_BATCH_CHARACTERS = 1 << 20
_BATCH_PIECES = 4096


def held_out_documents(documents: int, share: float) -> int:
    """How many of the last documents are held out: the share, rounded, at least one of two or more."""
    if share <= 0 or documents < 2:
        return 0
    return min(documents - 1, max(1, round(documents * share)))


def sample_texts(
    files: Sequence[SourceFile], text_key: str, sample_bytes: int, held_out: float, report: ProgressReport
) -> tuple[list[str], ReadState]:
    """A sample of the training split's pieces, spread evenly over the text, of at most `sample_bytes`.

    Every piece gets a random number (a fixed seed); the smallest are kept: one pass, bounded memory, no sizes needed.
    """
    state = ReadState(text_key)
    draw = random.Random(0)
    kept: list[tuple[float, int, int, bytes]] = []  # (-draw, place, document, text): the largest draw is on top
    held_bytes = documents = 0
    for place, piece in enumerate(iterate_pieces(files, state)):
        text = piece.text.encode()
        heapq.heappush(kept, (-draw.random(), place, documents, text))
        held_bytes += len(text)
        while held_bytes > sample_bytes and len(kept) > 1:
            held_bytes -= len(heapq.heappop(kept)[3])
        documents += piece.last
        report.update(state.read_bytes)
    first_held_out = documents - held_out_documents(documents, held_out)
    ordered = sorted(kept, key=lambda item: item[1])
    return [text.decode() for _, _, document, text in ordered if document < first_held_out], state


def batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of about a million characters, enough for every core and little to hold."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
