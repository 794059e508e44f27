"""order.py: a permutation for every (version, seed, epoch), computed without an index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainwright.data.order import SampleOrder, permute

sizes = st.integers(1, 700)
few = settings(max_examples=40, deadline=None)
keys = st.tuples(st.text(max_size=8), st.integers(0, 2**63), st.integers(0, 2**40))


@few
@given(sizes, keys)
@example(1, ("", 0, 0))
@example(4, ("", 0, 0))
@example(1024, ("v", 1, 2))
@example(1025, ("v", 1, 2))
def test_every_order_is_a_permutation(n: int, key: tuple[str, int, int]) -> None:
    version, seed, epoch = key
    found = permute(np.arange(n), n, version=version, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(found), np.arange(n))


@few
@given(sizes, keys, st.integers(0, 500), st.integers(0, 100), st.booleans())
def test_a_seek_is_the_same_as_going_through(
    n: int, key: tuple[str, int, int], start: int, count: int, shuffle: bool
) -> None:
    order = SampleOrder(n, version=key[0], seed=key[1], shuffle=shuffle)
    straight = order.samples(0, start + count)
    assert np.array_equal(order.samples(start, count), straight[start:])
    if count:
        assert order.sample_at(start) == straight[start]


@few
@given(st.integers(2**33, 2**40), keys, st.lists(st.integers(0, 2**33 - 1), min_size=2, max_size=50, unique=True))
def test_large_orders_need_no_index(n: int, key: tuple[str, int, int], positions: list[int]) -> None:
    found = permute(np.array(positions), n, version=key[0], seed=key[1], epoch=key[2])
    assert len(set(found.tolist())) == len(positions)
    assert found.min() >= 0
    assert found.max() < n


def test_epochs_seeds_and_versions_have_orders_of_their_own() -> None:
    n = 500
    base = permute(np.arange(n), n, version="a", seed=0, epoch=0)
    for version, seed, epoch in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        other = permute(np.arange(n), n, version=version, seed=seed, epoch=epoch)
        assert (other == base).sum() < 15  # 1 is expected of unrelated permutations
    assert np.array_equal(base, permute(np.arange(n), n, version="a", seed=0, epoch=0))


def test_the_order_is_the_one_that_earlier_versions_used() -> None:
    """A run that is resumed with a newer program has to see the samples that it would have seen."""
    assert permute(np.arange(10), 10, version="a", seed=0, epoch=1).tolist() == [3, 5, 1, 6, 2, 9, 8, 0, 4, 7]
    assert SampleOrder(1_000_003, version="golden", seed=7).samples(2_000_000, 4).tolist() == [
        304892,
        295386,
        909986,
        163605,
    ]


def test_the_order_looks_random() -> None:
    n, draws = 6, 3000
    places = np.zeros((n, n), dtype=np.int64)
    for seed in range(draws):
        places[np.arange(n), permute(np.arange(n), n, version="x", seed=seed, epoch=0)] += 1
    chi_square = ((places - draws / n) ** 2 / (draws / n)).sum()
    assert chi_square < 60  # 25 degrees of freedom: 99.99% of fair shuffles stay below


def test_without_shuffling_epochs_repeat_in_place() -> None:
    assert SampleOrder(3, version="", seed=0, shuffle=False).samples(1, 6).tolist() == [1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("index", [-1, 5])
def test_indices_outside_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        permute(np.array([index]), 5, version="", seed=0, epoch=0)
    with pytest.raises(ValueError):
        SampleOrder(0, version="", seed=0)
    with pytest.raises(ValueError):
        SampleOrder(5, version="", seed=0).samples(-1, 2)
