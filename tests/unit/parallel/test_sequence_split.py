"""Cutting micro-batches along the sequence: no process group needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data.batch import Batch
from trainwright.errors import UsageError
from trainwright.models.sequence import active_slice
from trainwright.parallel.context.sequence_split import SequenceSplit
from trainwright.parallel.context.ulysses import copies_of_kv_heads


def splits(ranks: int, **more: Any) -> list[SequenceSplit]:
    return [SequenceSplit(ranks, rank, None, lambda attend: attend, **more) for rank in range(ranks)]


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(2, 5), length=st.integers(1, 13))
def test_the_slices_are_the_sequence_and_a_tail_that_nobody_counts(ranks: int, length: int) -> None:
    tokens = torch.arange(2 * length).view(2, length) + 1
    whole = {"input_ids": tokens, "labels": tokens, "document_ids": tokens}
    cut = [split.split(whole) for split in splits(ranks)]
    assert len({part["input_ids"].shape for part in cut}) == 1, "every rank has as many tokens"
    for name, fill in (("input_ids", 0), ("labels", -100), ("document_ids", -1)):
        joined = torch.cat([part[name] for part in cut], dim=1)
        assert torch.equal(joined[:, :length], tokens)
        assert (joined[:, length:] == fill).all()
    places = [split.place(whole) for split in splits(ranks)]
    local = cut[0]["input_ids"].shape[1]
    for rank, place in enumerate(places):
        assert place is not None
        assert (place.first, place.length, place.padded_length) == (rank * local, length, ranks * local)
        assert place.document_ids is not None
        assert place.document_ids.shape == (2, ranks * local), "masks need every token's document"


def test_one_rank_gets_the_very_same_batch() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.long)
    batch = Batch(tokens, tokens, tokens, torch.arange(2), 0)
    split = SequenceSplit()
    assert split.split(batch) is batch
    with split.slicing(batch):
        assert active_slice() is None


def test_labels_are_shifted_before_they_are_cut() -> None:
    labels = torch.tensor([[10, 11, 12, 13, 14]])
    first, second = (s.split({"input_ids": labels, "labels": labels})["labels"] for s in splits(2, shifts=True))
    assert first.tolist() == [[11, 12, 13]]
    assert second.tolist() == [[14, -100, -100]]
    batch = Batch(labels, labels, None, torch.arange(1), 0)  # a Batch's are shifted already
    assert splits(2, shifts=True)[0].split(batch).labels.tolist() == [[10, 11, 12]]


def test_positions_that_start_again_are_documents_where_no_cache_is_filled() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.long)
    packed = {"input_ids": tokens, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    split = splits(2, packs_by_position=True, caches=True)[0]
    place = split.place(packed | {"use_cache": False})
    assert place is not None
    assert place.document_ids is not None
    assert place.document_ids.tolist() == [[0, 0, 1, 1]]
    for inputs in (packed, {"input_ids": tokens, "position_ids": torch.arange(4)[None], "use_cache": False}):
        place = split.place(inputs)
        assert place is not None
        assert place.document_ids is None


def test_inputs_without_a_place_along_the_sequence_are_refused() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.long)
    split = splits(2)[0]
    for name, value in (
        ("rows", torch.zeros(2)),
        ("image", torch.zeros(2, 3)),
        ("attention_mask", torch.ones(2, 6, 6)),
    ):
        with pytest.raises(UsageError, match=name):
            split.split({"input_ids": tokens, name: value})
    with pytest.raises(UsageError, match="input_ids"):
        split.split({"pixels": torch.zeros(2)})


@given(ranks=st.integers(1, 8), kv_heads=st.integers(1, 8), share=st.integers(1, 8))
def test_copies_of_key_value_heads_divide_and_keep_every_head_with_its_queries(
    ranks: int, kv_heads: int, share: int
) -> None:
    heads = kv_heads * share
    if heads % ranks:
        return
    copies = copies_of_kv_heads(heads, kv_heads, ranks)
    assert (kv_heads * copies) % ranks == 0
    assert heads % (kv_heads * copies) == 0
    # Query head h uses key/value head h // share, before and after.
    per_rank, kv_per_rank = heads // ranks, kv_heads * copies // ranks
    for h in range(heads):
        here = kv_per_rank * (h // per_rank) + (h % per_rank) // (per_rank // kv_per_rank)
        assert here // copies == h // share
