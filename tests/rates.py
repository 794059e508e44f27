"""Rates of a machine that is none: so many FLOP/s, bytes/s and seconds a message."""

from __future__ import annotations

from pathlib import Path

from trainwright.planner import calibrate
from trainwright.planner.processor import Rates
from trainwright.storage import atomic_write_json

SIDES = (32, 512, 8192)


def rates(
    ranks: int = 1, flops: float = 5e10, bytes_s: float = 1e10, message_s: float = 1e-4, operator_s: float = 1e-5
) -> Rates:
    products = {f"{m}x{n}x{k}": 2.0 * m * n * k / flops for m in SIDES for n in SIDES for k in SIDES}
    moved = tuple((float(size), size / bytes_s) for size in (1 << 12, 1 << 26))
    sent = tuple((float(size), message_s + size / 1e9) for size in (1 << 10, 1 << 20, 1 << 26))
    kinds = ("elementwise", "activation", "softmax", "lookup", "update")
    return Rates(
        "a machine",
        ranks,
        1,
        {"float32": products},
        {"float32": dict.fromkeys(kinds, moved)},
        {"float32": {"attention": ((64.0, 1 / flops),), "attention backward": ((64.0, 1 / flops),)}},
        dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "all-to-all"), sent) if ranks > 1 else {},
        50 << 20,
        operator_s,
    )


def remember(given: Rates) -> Path:
    """As if `given` had been measured here for as many ranks."""
    path = calibrate._cache(given.ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, given.to_json())
    return path
