"""loader.py: the global batches, whoever reads them, and the cursor."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import quick_prepare, write_jsonl, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data import Batch, BatchPlan, TokenDataset, TokenLoader, TokenSplit, eval_batches
from trainwright.errors import ConfigError, DataError, DataVersionError

T = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("loader")
    quick_prepare(write_texts(folder / "texts", 20), folder / "tokens", shard_tokens=700)
    return TokenDataset.open(folder / "tokens")


@pytest.fixture(scope="module")
def train(dataset: TokenDataset) -> TokenSplit:
    return dataset.split("train")


def take(loader: TokenLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def real_rows(batches: list[Batch]) -> list[tuple[int, list[int], list[int]]]:
    """(sample, inputs, labels) of every row that is not padding, in order."""
    return [
        (int(batch.sample_ids[row]), batch.input_ids[row].tolist(), batch.labels[row].tolist())
        for batch in batches
        for row in range(batch.size)
        if batch.sample_ids[row] >= 0
    ]


def global_batches(
    train: TokenSplit, global_size: int, replicas: int, steps: int, seed: int = 0
) -> list[list[tuple[int, list[int], list[int]]]]:
    plan = BatchPlan(global_size, 1, -(-global_size // replicas))
    loaders = [
        TokenLoader(train, T, plan, seed=seed, replica=replica, replicas=replicas, prefetch=0)
        for replica in range(replicas)
    ]
    return [[row for loader in loaders for row in real_rows([next(loader)])] for _ in range(steps)]


def test_sequences_are_the_packed_stream_and_labels_its_next_tokens(train: TokenSplit) -> None:
    loader = TokenLoader(train, T, BatchPlan(4, 2, 2), shuffle=False, prefetch=0)
    batch = next(loader)
    tokens, _, documents = train.read(0, 4 * T + 1)
    assert batch.input_ids.flatten().tolist() == tokens[:-1].tolist()
    assert batch.labels.flatten().tolist() == tokens[1:].tolist()
    assert batch.document_ids is not None
    assert batch.document_ids.flatten().tolist() == documents[:-1].tolist()
    assert batch.sample_ids.tolist() == [0, 1, 2, 3]
    assert batch.position == 0
    assert next(loader).position == 4
    assert batch.input_ids.dtype == batch.labels.dtype == batch.sample_ids.dtype == torch.int64


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_global_batches_do_not_depend_on_the_replicas(
    train: TokenSplit, global_size: int, replicas: int, seed: int
) -> None:
    assert global_batches(train, global_size, replicas, 2, seed) == global_batches(train, global_size, 1, 2, seed)


def test_an_uneven_split_is_padded_with_masked_rows(train: TokenSplit) -> None:
    plan = BatchPlan(64, 8, 3)
    batches = [next(TokenLoader(train, T, plan, replica=r, replicas=3, prefetch=0)) for r in range(3)]
    assert [int((batch.sample_ids >= 0).sum()) for batch in batches] == [22, 21, 21]
    for batch in batches:
        padding = batch.sample_ids < 0
        assert batch.size == 24
        assert len(batch.split(8)) == 3
        assert (batch.labels[padding] == -100).all()
        assert int(batch.valid_tokens()) == int((~padding).sum()) * T
    assert plan.padded_rows(3) == 8


def test_a_replica_without_rows_gets_padding_only(train: TokenSplit) -> None:
    batch = next(TokenLoader(train, T, BatchPlan(2, 1, 1), replica=2, replicas=3, prefetch=0))
    assert batch.sample_ids.tolist() == [-1]
    assert int(batch.valid_tokens()) == 0


def test_every_epoch_shows_every_sequence_once_in_another_order(train: TokenSplit) -> None:
    n = train.num_sequences(T)
    loader = TokenLoader(train, T, BatchPlan(1, 1, 1), prefetch=0)
    epochs = [[int(next(loader).sample_ids[0]) for _ in range(n)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n))
    assert epochs[0] != epochs[1]
    assert loader.epoch == 2.0


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=3),
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_resuming_anywhere_again_and_on_other_replicas_gives_the_same_samples(
    train: TokenSplit, global_size: int, legs: list[tuple[int, int]], shuffle: bool
) -> None:
    steps = sum(count for count, _ in legs)
    whole = TokenLoader(train, T, BatchPlan(global_size, 1, global_size), shuffle=shuffle, prefetch=0)
    expected = real_rows(take(whole, steps))
    found: list[tuple[int, list[int], list[int]]] = []
    state = None
    for count, replicas in legs:
        plan = BatchPlan(global_size, 1, -(-global_size // replicas))
        loaders = [
            TokenLoader(train, T, plan, shuffle=shuffle, replica=r, replicas=replicas, prefetch=0)
            for r in range(replicas)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(count):
            found += [row for loader in loaders for row in real_rows([next(loader)])]
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
    assert found == expected


def test_the_cursor_counts_what_was_handed_out_not_what_was_prefetched(train: TokenSplit) -> None:
    plan = BatchPlan(4, 2, 2)
    plain = real_rows(take(TokenLoader(train, T, plan, prefetch=0), 6))
    with TokenLoader(train, T, plan, prefetch=3) as loader:
        assert real_rows(take(loader, 3)) == plain[:12]
        state = loader.state_dict()
        assert state["position"] == 12
        take(loader, 2)
        loader.load_state_dict(state)  # back, with batches of the future in the queue
        assert real_rows(take(loader, 3)) == plain[12:]
        loader.set_position(0)
        assert real_rows(take(loader, 1)) == plain[:4]


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trainwright-data"]


def test_closing_ends_the_thread_and_a_forgotten_loader_does_too(train: TokenSplit) -> None:
    loader = TokenLoader(train, T, BatchPlan(2, 2, 1), prefetch=1)
    next(loader)
    assert len(data_threads()) == 1
    loader.close()
    loader.close()
    assert not data_threads()
    with pytest.raises(StopIteration):
        next(loader)
    forgotten = TokenLoader(train, T, BatchPlan(2, 2, 1), prefetch=1)
    next(forgotten)
    del forgotten
    assert not data_threads()


def test_an_error_in_the_background_reaches_the_loop_and_can_be_retried(
    train: TokenSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BatchPlan(2, 2, 1)
    expected = real_rows(take(TokenLoader(train, T, plan, prefetch=0), 3))
    real_read, broken = TokenSplit.read, threading.Event()

    def read(self: TokenSplit, start: int, length: int) -> object:
        if broken.is_set():
            raise OSError("the disk is gone")
        return real_read(self, start, length)

    monkeypatch.setattr(TokenSplit, "read", read)
    with TokenLoader(train, T, plan, prefetch=1) as loader:
        found = real_rows([next(loader)])
        broken.set()
        loader.set_position(2)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(loader)
        assert loader.position == 2
        broken.clear()
        assert found + real_rows(take(loader, 2)) == expected


def test_a_cursor_of_other_data_or_another_order_is_refused(train: TokenSplit) -> None:
    loader = TokenLoader(train, T, BatchPlan(2, 2, 1), prefetch=0)
    state = loader.state_dict() | {"position": 6}
    with pytest.raises(DataVersionError, match="allow_change"):
        loader.load_state_dict(state | {"version": "0" * 64})
    for change in ({"seed": 1}, {"shuffle": False}, {"sequence_length": 8}, {"split": "held_out"}):
        with pytest.raises(DataError, match=next(iter(change))):
            loader.load_state_dict(state | change)
    assert loader.position == 0
    loader.load_state_dict(state | {"version": "0" * 64, "seed": 1}, allow_change=True)
    assert loader.position == 6
    with pytest.raises(DataError, match="without"):
        loader.load_state_dict({"position": 1})
    for position in (-1, 1.5, "3", None, True):
        with pytest.raises(DataError, match="whole number"):
            loader.load_state_dict(state | {"position": position})


def test_a_split_shorter_than_a_sequence_and_a_plan_without_room_are_refused(train: TokenSplit) -> None:
    with pytest.raises(DataError, match="sequence_length=256"):
        TokenLoader(train, 10**6, BatchPlan(1, 1, 1))
    with pytest.raises(DataError):
        TokenLoader(train, 0, BatchPlan(1, 1, 1))
    for replica in range(3):
        with pytest.raises(ConfigError, match="accumulation=2"):
            TokenLoader(train, T, BatchPlan(4, 1, 1), replica=replica, replicas=3)


def test_prompts_are_masked_from_the_labels(tmp_path: Path) -> None:
    records = [{"prompt": f"Question {n}?", "completion": f" Answer {n}."} for n in range(30)]
    source = write_jsonl(tmp_path / "chats.jsonl", records)
    quick_prepare(source, tmp_path / "tokens", held_out=0.0)
    dataset = TokenDataset.open(tmp_path / "tokens")
    split, tokenizer = dataset.split("train"), dataset.load_tokenizer()
    expected: list[int] = []
    counted: list[bool] = []
    for record in records:
        prompt, completion = tokenizer.encode(record["prompt"]), tokenizer.encode(record["completion"])
        expected += [*prompt, *completion, dataset.eos_id]
        counted += [False] * len(prompt) + [True] * (len(completion) + 1)
    assert split.num_tokens == len(expected)
    assert split.num_counted == sum(counted)
    assert split.num_bytes == sum(len(record["completion"].encode()) for record in records)
    batch = next(TokenLoader(split, 32, BatchPlan(2, 2, 1), shuffle=False, prefetch=0))
    labels = [token if kept else -100 for token, kept in zip(expected, counted, strict=True)]
    assert batch.input_ids.flatten().tolist() == expected[:64]
    assert batch.labels.flatten().tolist() == labels[1:65]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_evaluation_predicts_every_token_once(dataset: TokenDataset, replicas: int) -> None:
    split = dataset.split("held_out")
    plan = BatchPlan(5, 2, 3)
    shares = [list(eval_batches(split, T, plan, replica=r, replicas=replicas)) for r in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    assert all(batch.size == plan.rows for share in shares for batch in share)
    rows = sorted(row for share in shares for row in real_rows(share))
    labels = [label for _, _, row in rows for label in row if label != -100]
    assert labels == split.read(0, split.num_tokens)[0][1:].tolist()
    assert [sample for sample, _, _ in rows] == list(range(-(-(split.num_tokens - 1) // T)))
    assert len(list(eval_batches(split, T, plan, max_batches=2))) == 2


def test_an_evaluation_without_held_out_text_says_so(tmp_path: Path) -> None:
    result = quick_prepare(write_texts(tmp_path / "texts", 1), tmp_path / "tokens")
    assert any("nothing is held out" in note for note in result.notes)
    with pytest.raises(DataError, match="held_out"):
        next(eval_batches(TokenDataset.open(tmp_path / "tokens").split("held_out"), T, BatchPlan(1, 1, 1)))


def test_samples_cross_shards(dataset: TokenDataset, train: TokenSplit) -> None:
    assert len(dataset.manifest.shards) > 3
    tokens, mask, documents = train.read(0, train.num_tokens)
    assert mask is None
    eos = np.flatnonzero(tokens == dataset.eos_id)
    assert len(eos) == train.num_documents
    assert np.array_equal(documents, np.searchsorted(eos, np.arange(len(tokens)), side="left"))
