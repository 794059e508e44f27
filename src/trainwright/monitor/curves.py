"""The curves of a run, from its metrics to what the report's script draws: smoothed, thinned, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .metrics import Metrics

MAX_POINTS = 2000
Points = tuple[list[float], list[float | None]]


def thin(x: Sequence[float], y: Sequence[float | None], limit: int = MAX_POINTS) -> Points:
    """At most `limit` points of a curve: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(x) <= limit:
        return list(x), list(y)
    stretches = limit // 2
    kept: list[int] = []
    for number in range(stretches):
        begin, end = number * len(x) // stretches, (number + 1) * len(x) // stretches
        known = [i for i in range(begin, end) if y[i] is not None]
        if not known:
            kept.append(begin)
            continue
        low = min(known, key=lambda i: y[i] or 0.0)
        high = max(known, key=lambda i: y[i] or 0.0)
        kept.extend(sorted({low, high}))
    return [x[i] for i in kept], [y[i] for i in kept]


def smooth(y: Sequence[float | None], width: int) -> list[float | None]:
    """Mean over a window of `width` points centred on each, narrower near the ends so that it never lags; gaps stay."""
    sums, counts = [0.0], [0]
    for value in y:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for i, value in enumerate(y):
        half = min(width // 2, i, len(y) - 1 - i)
        begin, end = i - half, i + half + 1
        result.append(None if value is None else (sums[end] - sums[begin]) / (counts[end] - counts[begin]))
    return result


def curves_of(metrics: Metrics) -> list[dict[str, Any]]:
    """What the report draws, chart by chart; a chart without any finite value is left out.

    Each chart: id, title, unit, number formats (d3's), and curves of {name, colour, x: steps, y, faint, points, line}.
    """
    steps, evaluations = metrics.steps, metrics.evaluations or [s for s in metrics.steps if "val_loss" in s]
    last = max([row["step"] for row in [*steps, *evaluations]], default=0)
    first = min([row["step"] for row in steps], default=0)
    width = max(len(steps) // 50, 1)

    def raw(name: str, key: str, **looks: Any) -> dict[str, Any]:
        return _curve(name, steps, lambda row: row.get(key), **looks)

    loss = [raw("each step", "loss", colour="--one-faint", faint=True)] if width > 1 else []
    loss.append(_curve("training", steps, lambda row: row.get("loss"), colour="--one", width=width))
    loss.append(_curve("held-out", evaluations, lambda row: row.get("val_loss"), colour="--two", points=True))
    speed = [raw("each step", "tokens_per_s", colour="--one-faint", faint=True)] if width > 1 else []
    speed.append(_curve("tokens/s", steps, lambda row: row.get("tokens_per_s"), colour="--one", width=width))
    bits = _curve("held-out", evaluations, lambda row: row.get("val_bits_per_byte"), colour="--two", points=True)
    memory = _curve("peak", steps, lambda row: (row.get("peak_memory_bytes") or 0) / 2**30 or None, colour="--one")
    charts = [
        _chart("loss", "Loss", "nats a token", loss, format=".4f"),
        _chart("bits", "Bits per byte", "held-out text", [bits], format=".4f"),
        _chart(
            "norm",
            "Gradient norm",
            "before clipping",
            [raw("norm", "grad_norm", colour="--one", line=1.25)],
            format=".3g",
        ),
        _chart("lr", "Learning rate", "", [raw("rate", "lr", colour="--one")], format=".3e", from_zero=True),
        _chart("speed", "Speed", "tokens/s, all ranks", speed, format=",.0f", ticks="~s", from_zero=True),
        _chart("memory", "Peak memory", "GiB, rank 0", [memory], format=".3f", suffix=" GiB", from_zero=True),
    ]
    for chart in charts:
        chart["range"] = [first - 0.02 * (last - first), last + 0.02 * (last - first)] if last > first else None
    return [chart for chart in charts if chart["curves"]]


def _chart(identity: str, title: str, unit: str, curves: list[dict[str, Any]], **looks: Any) -> dict[str, Any]:
    drawn = [curve for curve in curves if any(value is not None for value in curve["y"])]
    chart = {"id": identity, "title": title, "unit": unit, "curves": drawn, "suffix": "", "ticks": "~g"}
    return {**chart, "from_zero": False, **looks}


def _curve(
    name: str,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], Any],
    *,
    colour: str,
    faint: bool = False,
    points: bool = False,
    width: int = 1,
    line: float = 2,
) -> dict[str, Any]:
    y = [_finite(value(row)) for row in rows]
    x, thinned = thin([row["step"] for row in rows], smooth(y, width) if width > 1 else y)
    # Six digits are more than a screen shows, and halve the file.
    rounded = [None if item is None else float(f"{item:.6g}") for item in thinned]
    return {"name": name, "colour": colour, "x": x, "y": rounded, "faint": faint, "points": points, "line": line}


def _finite(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
