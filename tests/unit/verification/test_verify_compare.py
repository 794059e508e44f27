"""The comparisons that `verify` stands on: each must see what it is there to see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainwright.data.batch import Batch, BatchPlan
from trainwright.verification.collect import Piece, Placement, Seen
from trainwright.verification.compare import (
    Place,
    check_data,
    compare_gradients,
    compare_values,
    difference,
    relative,
    unequal_copies,
    unequal_start,
    untied,
    update_cosine,
)
from trainwright.verification.data import GivenBatches, rows_of, synthetic
from trainwright.verification.diagnose import Portion, explain, portions_of, weights_in
from trainwright.verification.reference import ReferenceStep

PLAN = BatchPlan(global_size=7, micro_size=2, accumulation=2)
REPLICAS = 2


def _layout(*names: str) -> dict[str, Placement]:
    return {name: Placement("shard=2: S(0)", (4, 3), {0: ((0, 2), (0, 3)), 1: ((2, 4), (0, 3))}) for name in names}


def _seen(whole: Batch, rank: int, replica: int, context: slice = slice(None)) -> list[Seen]:
    share = rows_of(whole, *PLAN.row_range(replica, REPLICAS), PLAN.rows)
    return [
        Seen(rank, 0, index, part.sample_ids, part.input_ids[:, context], part.labels[:, context])
        for index, part in enumerate(share.split(PLAN.micro_size))
    ]


def _check(seen: list[Seen], whole: Batch, places: list[Place]) -> list[str]:
    return [p.what for p in check_data(seen, whole, places, lambda r: PLAN.row_range(r, REPLICAS), 1)]


PLACES = [Place(0, 0, (0, 0)), Place(1, 0, (0, 0))]


def test_ranks_that_see_their_own_rows_are_right_padding_included() -> None:
    whole = synthetic(50, 7, 6, 1).whole(0)
    assert _check(_seen(whole, 0, 0) + _seen(whole, 1, 1), whole, PLACES) == []


def test_context_ranks_share_rows_and_fill_up() -> None:
    whole = synthetic(50, 7, 6, 1).whole(0)
    places = [Place(0, 0, (0, 0)), Place(0, 1, (0, 0)), Place(1, 0, (0, 0)), Place(1, 1, (0, 0))]
    halves = slice(0, 3), slice(3, 6)
    seen = [one for r in range(4) for one in _seen(whole, r, r // 2, halves[r % 2])]
    assert _check(seen, whole, places) == []
    filled = [
        replace(
            one,
            input_ids=torch.nn.functional.pad(one.input_ids, (0, 1)),
            labels=torch.nn.functional.pad(one.labels, (0, 1), value=-100),
        )
        for one in seen
    ]
    assert _check(filled, whole, places) == []
    without_half = [one for one in seen if one.rank != 1] + _seen(whole, 1, 0, halves[0])
    assert any("rank 0, 1 trained on other tokens" in what for what in _check(without_half, whole, places))


def test_each_way_to_feed_a_rank_wrongly_is_told() -> None:
    whole = synthetic(50, 7, 6, 1).whole(0)
    right = _seen(whole, 0, 0)
    twice = _check(right + _seen(whole, 1, 0), whole, PLACES)
    assert "rank 1 saw sample 0, replica 0's" in twice
    assert "rank 1 did not see its sample 4" in twice
    relabelled = [
        replace(a, input_ids=b.input_ids, labels=b.labels) for a, b in zip(_seen(whole, 1, 1), right, strict=True)
    ]
    assert any(
        "rank 1 trained on other tokens than those of sample 4" in w for w in _check(right + relabelled, whole, PLACES)
    )
    repeated = [*right, replace(right[0], index=7), *_seen(whole, 1, 1)]
    assert "rank 0 saw sample 0 twice in a step" in _check(repeated, whole, PLACES)
    padded = _seen(whole, 1, 1)
    padded[1].labels[1] = 5
    assert _check(right + padded, whole, PLACES) == ["rank 1 trains on a padded row"]


def test_errors_are_measured_against_the_norm_or_the_floor() -> None:
    g = torch.tensor([3.0, 4.0])
    assert difference(g * 1.01, g, 0.0).error == pytest.approx(0.01)
    assert difference(g, g, 0.0).cosine == pytest.approx(1.0)
    assert difference(-g, g, 0.0).cosine == pytest.approx(-1.0)
    tiny = difference(torch.tensor([1e-12, 0.0]), torch.tensor([0.0, 1e-12]), 1e-6)
    assert (tiny.error < 2e-6, tiny.cosine) == (True, 1.0)
    assert math.isinf(difference(torch.tensor([math.nan, 0.0]), g, 0.0).error)
    assert math.isinf(relative(math.nan, 1.0))
    assert not difference(torch.zeros(2), g, 0.0).error <= 1e-8


def test_gradients_are_matched_by_name_and_tie() -> None:
    step = ReferenceStep(1.0, 5.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)})
    found = {"a": torch.tensor([3.0, 4.0]), "alias": torch.tensor([3.0, 4.0]), "stray": torch.zeros(1)}
    differences, lacking = compare_gradients(found, step, {"alias": "a"}, 1e-6)
    assert {name: d.error for name, d in differences.items()} == {"a": 0.0, "alias": 0.0}
    assert lacking == ["stray", "b"]


def test_values_without_a_size_of_their_own_are_measured_against_an_average_one() -> None:
    expected = {"matrix": torch.ones(100), "bias": torch.zeros(4)}
    errors = compare_values({"matrix": torch.ones(100), "bias": torch.full((4,), 1e-9)}, expected, {})
    assert errors["matrix"] == 0.0
    assert errors["bias"] == pytest.approx(1e-9, rel=0.1)


def test_an_update_that_is_lost_shows_in_the_cosine() -> None:
    start, expected = {"a": torch.zeros(3)}, {"a": torch.tensor([1.0, 2.0, 3.0])}
    assert update_cosine({"a": expected["a"] * 0.5}, expected, start, {}) == pytest.approx(1.0)
    assert update_cosine({"a": torch.zeros(3)}, expected, start, {}) == 0.0
    assert update_cosine({"a": torch.zeros(3)}, start, start, {}) == 1.0
    copies = {"a": expected["a"], "alias": expected["a"]}
    assert update_cosine(copies, expected, start, {"alias": "a"}) == pytest.approx(1.0)


def test_other_first_values_and_missing_parameters_are_told() -> None:
    layout = _layout("a", "c")
    found = {"a": torch.ones(2, dtype=torch.float64), "c": torch.ones(2)}
    problems = unequal_start(found, {"a": torch.ones(2) + 1e-7, "b": torch.ones(2)}, {}, layout)
    assert [(p.parameter, p.kind) for p in problems] == [("a", "weights"), ("c", "weights"), ("b", "weights")]
    assert unequal_start({"a": found["a"]}, {"a": torch.ones(2)}, {}, layout) == []


def test_copies_are_compared_box_by_box() -> None:
    layout = _layout("a")
    box, other = ((0, 2), (0, 3)), ((2, 4), (0, 3))

    def piece(at: tuple[tuple[int, int], ...], digest: bytes) -> Piece:
        return Piece(at, digest, None)

    right = [{"a": piece(box, b"x")}, {"a": piece(other, b"y")}, {"a": piece(box, b"x")}]
    assert unequal_copies(right, "the gradient", 1, layout) == []
    wrong = [*right, {"a": piece(box, b"z")}]
    (problem,) = unequal_copies(wrong, "the gradient", 1, layout)
    assert (problem.parameter, problem.rank) == ("a", 3)


def test_ties_hold_as_one_parameter_or_as_equal_copies() -> None:
    ties, layout, weight = {"head": "embedding"}, _layout("head", "embedding"), torch.ones(2)
    assert untied({"embedding": weight}, ties, [], 1, layout) == []
    assert untied({"embedding": weight, "head": weight.clone()}, ties, [], 1, layout) == []
    assert untied({"embedding": weight, "head": weight + 1}, ties, [], 1, layout)[0].parameter == "head"
    assert "are two parameters" in untied({"embedding": weight}, ties, ["head"], 0, layout)[0].what


def _parts() -> tuple[list[Tensor], list[Portion], dict[int, tuple[tuple[int, int], ...]]]:
    generator = torch.Generator().manual_seed(0)
    portions = portions_of([PLAN.row_range(r, REPLICAS) for r in range(REPLICAS)], [(0,), (1,)], PLAN.micro_size)
    parts = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in portions]
    return parts, portions, _layout("a")["a"].boxes


def test_a_mixture_of_micro_batches_is_found() -> None:
    parts, _, _ = _parts()
    assert len(parts) == 4  # 4 + 3 rows, two rows a micro-batch
    weights, left = weights_in(parts[0] + 0.5 * parts[1] + parts[2], parts)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 1.0, 0.0], dtype=torch.float64))
    assert left < 1e-12


def test_the_explanation_names_ranks_and_micro_batches() -> None:
    parts, portions, boxes = _parts()
    right = torch.stack(parts).sum(dim=0)
    assert explain(right, parts, portions, boxes).sentences == []
    dropped = right.clone()
    dropped[:2] = (parts[0] + parts[1])[:2]  # rank 0's rows hold its own part alone
    told = explain(dropped, parts, portions, boxes)
    assert told.sentences == [
        "in the rows of rank 0 rank 1's micro-batch 1 counts 0 times; rank 1's micro-batch 2 counts 0 times"
    ]
    assert told.ranks == {1}
    scaled = explain(right + 0.5 * parts[2], parts, portions, boxes)
    assert scaled.sentences == ["in all rows rank 1's micro-batch 1 counts 1.5 times"]
    strange = right + torch.linspace(1, 2, 12, dtype=torch.float64).view(4, 3) ** 3
    assert "no mixture" in explain(strange, parts, portions, boxes).sentences[-1]


def test_shares_of_synthetic_batches_are_the_whole_batch() -> None:
    data = synthetic(50, 7, 6, 2)
    for step in range(2):
        whole = data.whole(step)
        shares = [list(data.shares(PLAN, r, REPLICAS))[step] for r in range(REPLICAS)]
        ids = torch.cat([share.sample_ids for share in shares])
        assert sorted(ids[ids >= 0].tolist()) == whole.sample_ids.tolist()
        assert sum(int(s.valid_tokens()) for s in shares) == int(whole.valid_tokens())
        assert (whole.labels[0] == -100).all()
        assert all(share.size == PLAN.rows for share in shares)
    from trainwright.errors import UsageError

    with pytest.raises(UsageError, match="one size"):
        GivenBatches([data.whole(0), rows_of(data.whole(1), 0, 3, 3)])
