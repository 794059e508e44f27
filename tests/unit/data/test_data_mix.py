"""A mix of data sets: shares by weight, each set in its own order, resumable anywhere, nothing lost at the seams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import quick_prepare, write_texts

import trainwright as tw
from trainwright.config.data_schema import DataConfig, MixEntry
from trainwright.data.batch import BatchPlan
from trainwright.data.loader import TokenLoader
from trainwright.data.mix import MixedDataset, MixedOrder, open_dataset, places_by_weight
from trainwright.data.shards import TokenDataset
from trainwright.errors import ContradictionError, DataError, DataVersionError


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mix")
    first = quick_prepare(write_texts(folder / "a", 12), folder / "one", held_out=0.2).path
    second = quick_prepare(
        write_texts(folder / "b", 40, words=60), folder / "two", held_out=0.1, tokenizer=first / "tokenizer.json"
    ).path
    return [first, second]


def _open(sets: list[Path], *weights: float | None) -> MixedDataset:
    entries = tuple(MixEntry(path=str(p), weight=w) for p, w in zip(sets, weights or (None,) * len(sets), strict=True))
    found = open_dataset(DataConfig(mix=entries))
    assert isinstance(found, MixedDataset)
    return found


def test_places_hold_the_weights() -> None:
    assert places_by_weight([1, 1]) == [2048, 2048]
    assert sum(places_by_weight([0.7, 0.2, 0.1])) == 4096
    assert places_by_weight([1e9, 1]) == [4095, 1]
    assert sum(places_by_weight([1.0] * 3 + [1e-9] * 50)) == 4096


def test_each_set_comes_in_its_own_order_and_share() -> None:
    order = MixedOrder([50, 7, 1000], [0.5, 0.3, 0.2], ["a", "b", "c"], "v", seed=3, shuffle=True)
    whole = order.samples(0, 20_000)
    for start, count in ((0, 1), (4090, 12), (777, 5000), (19_999, 1)):
        assert order.samples(start, count).tolist() == whole[start : start + count].tolist()
    for low, high, share in ((0, 50, 0.5), (50, 57, 0.3), (57, 1057, 0.2)):
        mine = whole[(whole >= low) & (whole < high)] - low
        assert abs(len(mine) / len(whole) - share) < 0.005
        size = high - low
        for epoch in range(len(mine) // size):  # each epoch of a set holds each of its samples once
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    # In every stretch, not only on the whole.
    for start in range(0, 16_000, 500):
        stretch = whole[start : start + 500]
        assert abs((stretch < 50).mean() - 0.5) < 0.12


def test_samples_are_those_of_the_sets(sets: list[Path]) -> None:
    mixed, length = _open(sets, 0.25, 0.75), 16
    split = mixed.split("train")
    singles = [TokenDataset.open(path).split("train") for path in sets]
    counts = [single.num_sequences(length) for single in singles]
    assert split.num_sequences(length) == sum(counts)
    with TokenLoader(split, length, BatchPlan(8, 8, 1), seed=1, prefetch=0) as loader:
        for _ in range(40):
            batch = next(loader)
            for row, sample in enumerate(batch.sample_ids.tolist()):
                number = 0 if sample < counts[0] else 1
                inside = sample - (counts[0] if number else 0)
                tokens, _, documents = singles[number].read(inside * length, length + 1)
                assert batch.input_ids[row].tolist() == tokens[:-1].tolist()
                assert batch.labels[row].tolist() == tokens[1:].tolist()
                first = int(batch.document_ids[row, 0]) if batch.document_ids is not None else -1
                assert first - (singles[0].documents_of_set if number else 0) == documents[0]
    assert "two: " in mixed.document_name(singles[0].documents_of_set)


def test_resumes_anywhere_on_any_number_of_replicas(sets: list[Path]) -> None:
    split = _open(sets, 1.0, 3.0).split("train")

    def run(position: int, replicas: int, steps: int) -> list[int]:
        loaders = [
            TokenLoader(split, 8, BatchPlan(6, -(-6 // replicas), 1), replica=r, replicas=replicas, prefetch=0)
            for r in range(replicas)
        ]
        for loader in loaders:
            loader.set_position(position)
        return [i for _ in range(steps) for loader in loaders for i in next(loader).sample_ids.tolist() if i >= 0]

    whole = run(0, 1, 900)
    assert run(0, 2, 300) + run(1800, 3, 300) + run(3600, 1, 300) == whole


def test_weights_and_sets_are_part_of_the_version(sets: list[Path]) -> None:
    one, other = _open(sets, 1.0, 3.0), _open(sets, 1.0, 2.0)
    assert one.version != other.version
    cursor = TokenLoader(one.split("train"), 8, BatchPlan(6, 6, 1)).state_dict()
    with pytest.raises(DataVersionError):
        TokenLoader(other.split("train"), 8, BatchPlan(6, 6, 1)).load_state_dict(cursor)


def test_held_out_texts_follow_each_other(sets: list[Path]) -> None:
    held_out = _open(sets).split("held_out")
    parts = [TokenDataset.open(path).split("held_out") for path in sets]
    expected = np.concatenate([part.read(0, part.num_tokens)[0] for part in parts])
    assert held_out.read(0, held_out.num_tokens)[0].tolist() == expected.tolist()
    assert held_out.num_bytes == sum(part.num_bytes for part in parts)
    assert held_out.read(3, 0)[0].tolist() == []


def test_what_cannot_be_mixed_is_refused(sets: list[Path], tmp_path: Path) -> None:
    stranger = quick_prepare(write_texts(tmp_path / "c", 5), tmp_path / "three", vocab_size=270).path
    with pytest.raises(DataError, match="different tokenizers"):
        _open([sets[0], stranger])
    with pytest.raises(DataError, match=r"set 1 of the mix has no whole sequence"):
        _open(sets).split("train").num_sequences(10**6)
    with pytest.raises(ContradictionError, match="weight for 1 of 2"):
        tw.load_config({"data": {"mix": [{"path": "a", "weight": 1}, {"path": "b"}]}})
    with pytest.raises(ContradictionError, match="one set, or a mix"):
        tw.load_config({"data": {"path": "c", "mix": [{"path": "a"}]}})
