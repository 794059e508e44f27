"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from trainwright.monitor import words


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (5_612_032, "5.61M"),
        (1.2e9, "1.2B"),
        (7e12, "7T"),
        (2.5, "2.5"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert words.count(number) == text


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (5.3 * 2**20, "5.3 MiB"), (80 * 2**30, "80 GiB")]
)
def test_byte_size(size: float, text: str) -> None:
    assert words.byte_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (48, "48 s"),
        (59.7, "1:00 min"),
        (151, "2:31 min"),
        (11110, "3:05:10 h"),
        (187200, "2 d 04 h"),
        (math.inf, "?"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_percent_and_figure() -> None:
    assert words.percent(0.4123) == "41.2%"
    assert words.percent(None) == words.percent(math.nan) == "–"
    assert words.figure(3.21432) == "3.214"
    assert words.figure(0.12345) == "0.1235"
    assert words.figure(12345.6) == "12346"
    assert words.figure(1.5e-5) == "1.50e-05"
    assert words.figure(math.inf) == "inf"
    assert words.figure(0.0) == "0"
    assert words.figure(None) == "–"
