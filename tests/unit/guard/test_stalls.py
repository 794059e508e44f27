"""Slow data is named with its rank; data that keeps up is not."""

from __future__ import annotations

from trainwright.guard.stalls import StallDetector, decoded, encoded


def test_the_longest_wait_and_its_rank_travel_in_one_number() -> None:
    waits = [0.004, 1.25, 0.3]
    assert decoded(max(encoded(wait, rank) for rank, wait in enumerate(waits))) == (1.25, 1)
    assert decoded(encoded(0.0, 7)) == (0.0, 7)
    assert decoded(encoded(1e12, 1_000_000)) == (2147483.648, 1_000_000)


def test_a_stalled_loader_is_told_once_in_a_while() -> None:
    detector = StallDetector()
    told = [detector.push(0.4, 2, 0.1) for _ in range(600)]
    said = [(step, text) for step, text in enumerate(told) if text]
    assert [step for step, _ in said] == [19, 519]
    assert "8.0 s of the last 20 steps' 10.0 s were waiting for data, mostly on rank 2" in said[0][1]


def test_data_that_keeps_up_is_not_mentioned() -> None:
    detector = StallDetector()
    assert not [text for _ in range(100) if (text := detector.push(0.01, 0, 0.2))]
    assert not [text for step in range(100) if (text := detector.push(3.0 if step == 50 else 0.0, 0, 1.0))]
