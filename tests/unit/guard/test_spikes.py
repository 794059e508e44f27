"""Spikes of the loss: told where they are, not where training only falls fast or wavers."""

from __future__ import annotations

import math
import random

from trainwright.guard.spikes import SpikeDetector


def test_a_spike_is_told_and_a_falling_or_noisy_loss_is_not() -> None:
    rng = random.Random(0)
    detector = SpikeDetector(10.0)
    losses = [2.0 + 7.0 * math.exp(-step / 20) + rng.gauss(0, 0.05) for step in range(400)]
    assert not [step for step, loss in enumerate(losses) if detector.push(loss) is not None]
    deviations = detector.push(4.0)
    assert deviations is not None
    assert deviations > 10
    assert detector.push(losses[-1]) is None


def test_the_first_steps_and_values_that_are_no_numbers_tell_nothing() -> None:
    detector = SpikeDetector(10.0)
    assert all(detector.push(loss) is None for loss in [1.0] * 31)
    assert detector.push(math.nan) is None
    assert detector.push(1.0) is None
    assert detector.push(1.5) is not None
    assert SpikeDetector(0.0).push(1e9) is None


def test_it_goes_on_where_it_was() -> None:
    first, second = SpikeDetector(5.0), SpikeDetector(5.0)
    for step in range(50):
        first.push(2.0 + 0.01 * (step % 3))
    second.load(first.state())
    assert first.push(3.0) == second.push(3.0) is not None
