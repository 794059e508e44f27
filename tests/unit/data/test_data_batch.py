"""batch.py: the plan of a global batch and the batch of a replica."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data import Batch, BatchPlan
from trainwright.errors import ConfigError, UsageError


def make_batch(rows: int = 4, length: int = 3) -> Batch:
    tokens = torch.arange(rows * length).reshape(rows, length)
    labels = tokens + 1
    labels[-1] = -100
    return Batch(tokens, labels, tokens * 0, torch.arange(rows), 7)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 17))
def test_rows_are_shared_out_evenly_and_in_order(global_size: int, replicas: int) -> None:
    plan = BatchPlan(global_size, 1, -(-global_size // replicas))
    ranges = [plan.row_range(replica, replicas) for replica in range(replicas)]
    assert [row for low, high in ranges for row in range(low, high)] == list(range(global_size))
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert plan.padded_rows(replicas) == sum(plan.rows - size for size in sizes)


def test_a_plan_without_room_names_the_accumulation_that_works() -> None:
    with pytest.raises(ConfigError, match=r"batch\.accumulation=3"):
        BatchPlan(64, 8, 2).row_range(0, 3)
    assert BatchPlan(64, 8, 3).row_range(0, 3) == (0, 22)
    for sizes in ((0, 1, 1), (1, -1, 1), (1, 1, True)):
        with pytest.raises(ConfigError):
            BatchPlan(*sizes)


def test_micro_batches_are_views_of_the_batch() -> None:
    batch = make_batch()
    parts = batch.split(2)
    assert [part.size for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
    assert parts[1].input_ids.data_ptr() == batch.input_ids[2:].data_ptr()
    assert [part.position for part in parts] == [7, 7]
    assert parts[0].document_ids is not None
    with pytest.raises(UsageError, match="micro_size"):
        batch.split(3)


def test_valid_tokens_are_counted_without_leaving_the_device() -> None:
    count = make_batch().valid_tokens()
    assert count.shape == ()
    assert count.item() == 9


def test_a_batch_moves_as_a_whole() -> None:
    moved = make_batch().to("meta")
    assert moved.input_ids.device.type == moved.labels.device.type == moved.sample_ids.device.type == "meta"
    batch = make_batch()
    assert Batch(batch.input_ids, batch.labels, None, batch.sample_ids, 0).to("cpu").document_ids is None


def test_shapes_that_do_not_fit_are_a_bug() -> None:
    batch = make_batch()
    with pytest.raises(AssertionError):
        Batch(batch.input_ids, batch.labels[:2], None, batch.sample_ids, 0)
