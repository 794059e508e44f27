"""From positions to one message: who keeps whom waiting, and when nothing is said."""

from __future__ import annotations

from typing import Any

from trainwright.guard.verdict import Report, disagreement, first_difference, judge
from trainwright.position import Position, of_ranks
from trainwright.processes import ProcessId

NAMES = ("all_gather(a)", "all_gather(b)", "all_gather(c)", "reduce(a)")


def at(rank: int, call: str = "train_batch", step: int = 5, collectives: int = 4, **changes: Any) -> Position:
    facts: dict[str, Any] = {
        "world_size": 4, "process": ProcessId(100 + rank, 0, 0), "host": "node", "notes": 9,
        "since": 0.0, "micro_batch": 1, "micro_batches": 2,
        "phase": "forward" if call else "", "module": "blocks.1" if call else "", "last_collectives": NAMES[:collectives],
    }  # fmt: skip
    return Position(rank=rank, call=call, step=step, collectives=collectives, **(facts | changes))


def reports(*positions: Position, waited_s: float = 8.0, **changes: Any) -> dict[int, Report]:
    return {p.rank: Report(p, waited_s, **({"blocked": True} | changes)) for p in positions}


def decide(found: dict[int, Report], size: int = 2, limit: bool = False) -> str:
    verdict = judge(found, size, limit_reached=limit, disagree_s=5.0)
    return verdict[0] if verdict else ""


def test_ranks_in_one_place_wait_on() -> None:
    assert decide(reports(at(0), at(1))) == ""
    # Ahead by a collective: the other one computes, or is slow.
    assert decide(reports(at(0, collectives=4), at(1, collectives=3))) == ""


def test_a_slow_or_silent_rank_is_no_proof_before_the_limit() -> None:
    assert decide(reports(at(0, "save")) | reports(at(1), waited_s=0.3)) == ""
    assert decide(reports(at(0, "save")) | reports(at(1), blocked=False)) == ""  # it computes
    outside = reports(at(0), at(1, ""))
    assert decide(outside) == ""
    assert decide(reports(at(0))) == ""
    assert "rank 1 did not answer" in decide(reports(at(0)), limit=True)
    assert "rank 1 did not arrive where the others wait" in decide(outside, limit=True)
    assert (
        judge(outside, 2, limit_reached=True, disagree_s=5.0, outside_s=1800.0) is None
    )  # it may be long in its own code
    assert decide(reports(at(0), at(1), blocked=False), limit=True) == ""  # nobody waits for anybody


def test_different_calls_are_told_with_the_few_that_made_them() -> None:
    positions = [at(rank) for rank in (0, 2, 3)] + [at(1, "save", step=5, phase="", module="")]
    got = decide(reports(*positions), size=4)
    assert "rank 1 called save(), the others did not" in got
    assert "ranks 0, 2-3: step 5 in forward of blocks.1, micro-batch 1 of 2" in got
    assert "rank 1: save() after step 4" in got


def test_ranks_that_ended_early_have_no_batch() -> None:
    got = decide(reports(at(0), at(1, "shutdown", step=5)))
    assert got.startswith("rank 1 ended after step 4: no batch for step 5, in which rank 0 waits")


def test_different_steps_of_one_call() -> None:
    assert "different steps of train_batch()" in decide(reports(at(0, step=6), at(1, step=5)))


def test_collectives_that_part() -> None:
    other = at(1, collectives=3, last_collectives=("all_gather(a)", "all_gather(a)", "all_gather(b)"))
    got = decide(reports(at(0), other))
    assert got.startswith("the ranks called different collectives: rank 0: all_gather(b); rank 1: all_gather(a)")
    assert disagreement(reports(at(0, own_collectives=True), other)) is None  # a pipeline's ranks hold other layers


def test_the_ring_of_collectives_may_have_lost_the_place() -> None:
    long = [at(0, collectives=200, last_collectives=NAMES), at(1, collectives=10, last_collectives=NAMES)]
    assert first_difference(long) != ""
    assert disagreement(reports(*long)) is None


def test_a_dead_process_ends_the_waiting_at_once() -> None:
    found = reports(at(0)) | {1: Report(at(1), 1.0, answers=False, gone=True)}
    assert decide(found).startswith("rank 1 is gone")


def test_very_many_ranks_are_told_in_few_lines() -> None:
    many = reports(*(at(rank, module=f"blocks.{rank % 20}") for rank in range(1000)))
    got = decide(many, size=1000, limit=True)
    assert got.count("\n") < 20
    assert "and 14 more places" in got


def test_ranges_of_ranks() -> None:
    assert of_ranks([0]) == "rank 0"
    assert of_ranks([3, 1, 2, 7]) == "ranks 1-3, 7"
