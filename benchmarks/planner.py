"""The planner held against published runs: predicted and measured throughput and memory, row by row.

    python benchmarks/planner.py [--rows FILE.csv] [--json FILE]      the table, the worst rows, medians
    python benchmarks/planner.py --cross-validate                     each source predicted by constants fitted to the others
    python benchmarks/planner.py --fit                                fits the constants anew, and prints them

Throughput is compared (tokens a second and GPU), because it has one meaning; where a row tells only TFLOP/s or MFU, they
are turned into it with the row's own convention. Memory is allocated in some rows and reserved in others.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.hardware import DEVICES, Device
from trainwright.planner.memory import GIB
from trainwright.planner.published import Predicted, measured_tokens_per_s, predicted

ROWS = Path(__file__).parent / "published.csv"
Row = dict[str, str]

# What may be fitted, and between which bounds; the rest is given by its meaning.
TIME_BOUNDS: dict[str, tuple[float, float]] = {
    "reduction_half": (60, 500), "wave_loss": (0.45, 1.5), "elementwise": (10, 32), "eager": (1.1, 3.0),
    "gap_s": (1e-6, 6e-6), "attention_backward": (2.4, 3.6), "vendor_attention": (1.0, 2.2), "score_products": (0.3, 0.8),
    "score_passes": (4, 10), "context_loss": (0.03, 0.4), "logits_passes": (2, 10), "tensor_exposed": (0.3, 1.0),
    "link_share": (0.6, 0.95), "network_share": (0.4, 0.92), "overlap": (0.6, 0.98), "contention": (0.02, 0.4),
    "latency_s": (3e-6, 40e-6), "straggle": (0.002, 0.03),
}  # fmt: skip
TIME_EXPECTED = {
    "reduction_half": 250, "wave_loss": 0.8, "elementwise": 14, "eager": 1.5, "gap_s": 3e-6, "attention_backward": 2.8,
    "vendor_attention": 1.5, "score_products": 0.5, "score_passes": 6, "context_loss": 0.15, "logits_passes": 6,
    "tensor_exposed": 0.8, "link_share": 0.75, "network_share": 0.6, "overlap": 0.85, "contention": 0.1,
    "latency_s": 1e-5, "straggle": 0.01,
}  # fmt: skip
DEVICE_BOUNDS = {"product": (0.4, 0.92), "product_8bit": (0.35, 0.75), "attention": (0.3, 0.9)}
DEVICE_EXPECTED = {"product": 0.72, "product_8bit": 0.6, "attention": 0.6}
# Curves that devices share.
GENERATIONS = {
    "V100-32GB": ("V100-32GB",),
    "A100-80GB": ("A100-80GB", "A100-40GB"),
    "H100-80GB": ("H100-80GB", "H200-141GB", "H100-PCIe-80GB"),
    "H100-96GB-HBM2e-500W": ("H100-96GB-HBM2e-500W",),
    "B200": ("B200", "GB200"),
}
# One kind of cell under two limits of power: attention runs at the same share of a product's speed.
SHARED = {("attention", "H100-96GB-HBM2e-500W"): "H100-80GB"}
Point = dict[str, float]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def evaluated(
    rows: Sequence[Row], constants: Constants = DEFAULT, devices: Mapping[str, Device] = DEVICES
) -> list[tuple[Row, Predicted, float | None, float | None]]:
    """(row, predicted, error of throughput, error of memory), an error being predicted / measured - 1."""
    found = []
    for row in rows:
        result = predicted(row, constants, devices)
        speed = measured_tokens_per_s(row, result.shape)
        held = row.get("peak_mem_GiB")
        found.append(
            (
                row,
                result,
                None if speed is None else result.tokens_per_s / speed - 1,
                result.memory.total / GIB / float(held) - 1 if held else None,
            )
        )
    return found


def summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = [abs(e) for e in errors]
    return {
        "rows": len(sizes),
        "median": statistics.median(sizes),
        "within_30": sum(s <= 0.30 for s in sizes) / len(sizes),
        "worst": max(sizes),
    }


def say(name: str, found: dict[str, float]) -> None:
    print(
        f"{name:<12} {found['rows']:3.0f} rows   median error {found['median']:6.1%}   "
        f"within 30%: {found['within_30']:6.1%}   worst {found['worst']:.0%}"
    )


# --- fitting -------------------------------------------------------------------------------------------------------


def expected() -> Point:
    """Where the fit begins and what it is pulled to."""
    point = {f"time.{name}": float(value) for name, value in TIME_EXPECTED.items()}
    for device in GENERATIONS:
        for name, value in DEVICE_EXPECTED.items():
            if (name == "product_8bit" and DEVICES[device].tflops_8bit is None) or (name, device) in SHARED:
                continue
            point[f"{device}.{name}"] = value
    return point


def bounds(key: str) -> tuple[float, float]:
    name = key.rsplit(".", 1)[1]
    return TIME_BOUNDS[name] if key.startswith("time.") else DEVICE_BOUNDS[name]


def at(point: Point) -> tuple[Constants, dict[str, Device]]:
    """The constants and devices of a point."""
    times = {key[5:]: value for key, value in point.items() if key.startswith("time.")}
    devices = dict(DEVICES)
    for key, value in point.items():
        if not key.startswith("time."):
            generation, name = key.rsplit(".", 1)
            others = tuple(other for (what, other), home in SHARED.items() if (what, home) == (name, generation))
            for device in GENERATIONS[generation] + others:
                devices[device] = dataclasses.replace(devices[device], **{name: value})  # type: ignore[arg-type]
    return dataclasses.replace(DEFAULT, **times), devices


def loss(point: Point, start: Point, rows: Sequence[Row]) -> float:
    """Of errors in throughput, large ones counted little more than middling ones, and of the distance from what is expected."""
    constants, devices = at(point)
    total = 0.0
    for row in rows:
        result = predicted(row, constants, devices)
        speed = measured_tokens_per_s(row, result.shape)
        if speed is not None:
            total += math.log1p((math.log(result.tokens_per_s / speed) / 0.12) ** 2)
    for key, value in point.items():
        low, high = bounds(key)
        total += (math.log(value / start[key]) / math.log(high / low)) ** 2
    return total


def fit(rows: Sequence[Row], rounds: int = 15) -> Point:
    """Coordinates in turn, each by a step that grows while it helps."""
    start = expected()
    point, steps, rng = dict(start), dict.fromkeys(start, 0.15), random.Random(0)
    best = loss(point, start, rows)
    for _ in range(rounds):
        for key in rng.sample(list(point), len(point)):
            helped = False
            for sign in (1, -1):
                low, high = bounds(key)
                tried = point | {key: min(max(point[key] * math.exp(sign * steps[key]), low), high)}
                value = loss(tried, start, rows)
                if value < best - 1e-6:
                    best, point, helped = value, tried, True
                    break
            steps[key] = max(0.01, steps[key] * (1.3 if helped else 0.6))
    return point


def cross_validate(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Errors of throughput and of memory of each source's rows, with constants fitted to the other sources'."""
    sources = sorted({row["source"] for row in rows})
    speeds: list[float] = []
    held: list[float] = []
    for number, source in enumerate(sources):
        constants, devices = at(fit([row for row in rows if row["source"] != source], rounds=6))
        for _, _, speed, memory in evaluated([r for r in rows if r["source"] == source], constants, devices):
            speeds += [] if speed is None else [speed]
            held += [] if memory is None else [memory]
        print(f"{number + 1} of {len(sources)} sources", file=sys.stderr)
    return speeds, held


# --- pairs that differ in one choice ---------------------------------------------------------------------------------

_FOLLOWS = ("dp", "global_batch_seqs")
"""Cells that follow from another choice: how many replicas there are, and what they come to."""
_CHOICES = ("n_gpus", "zero_or_fsdp", "tp", "sp", "pp", "vpp", "cp", "micro_batch", "precision", "recompute", "compile")
_SAME = ("source", "model", "n_layers", "d_model", "n_heads", "seq_len", "gpu", "optimizer")


def pairs(rows: Sequence[Row]) -> list[tuple[str, Row, Row]]:
    """(the column that differs, the measured faster row, the slower one) by at least 3%; sources count without their table."""
    found = []
    for number, one in enumerate(rows):
        for other in rows[number + 1 :]:
            alike = all(one[name][:30] == other[name][:30] for name in _SAME)
            differ = [name for name in _CHOICES if one[name] != other[name]]
            if (
                not alike
                or len(differ) != 1
                or any(one[n] != other[n] for n in _FOLLOWS if differ[0] not in ("n_gpus", "pp", "cp"))
            ):
                continue
            speeds = [measured_tokens_per_s(row, predicted(row).shape) for row in (one, other)]
            if speeds[0] is not None and speeds[1] is not None and abs(speeds[0] / speeds[1] - 1) >= 0.03:
                found.append((differ[0], one, other) if speeds[0] > speeds[1] else (differ[0], other, one))
    return found


# --- what is printed -----------------------------------------------------------------------------------------------


def describe(row: Row, found: Predicted) -> str:
    plan = found.plan
    parts = [
        row["id"],
        f"{row['model'][:24]:<24}",
        f"{row['n_gpus']:>5} x {row['gpu'][:10]:<10}",
        f"zero {plan.zero}",
        f"tensor {plan.tensor}",
        f"pipe {plan.pipeline:>2}x{plan.interleave}",
        f"ctx {plan.context}",
        f"{plan.micro_batch:>2} x {plan.micro_batches:<4}",
        f"{plan.precision:<4}",
        f"{plan.recompute:<9}",
    ]
    return "  ".join(parts)


def shares(found: Predicted) -> str:
    total = found.step.total
    values = [(field.name, getattr(found.step, field.name) / total) for field in dataclasses.fields(found.step)]
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(values, key=lambda v: -v[1]) if share >= 0.05)


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = evaluated(rows)
    facts = []
    for row, result, speed, memory in found:
        told = (
            ""
            if speed is None
            else f"{result.tokens_per_s / (1 + speed):>9.0f} {result.tokens_per_s:>9.0f} {speed:>+6.0%}"
        )
        held = (
            ""
            if memory is None
            else f"{float(row['peak_mem_GiB']):>6.1f} {result.memory.total / GIB:>6.1f} {memory:>+5.0%}"
        )
        print(f"{describe(row, result)}  {told:<26}  {held}")
        facts.append({"id": row["id"], "tokens_per_s_error": speed, "peak_memory_error": memory, "mfu": result.mfu})
    print("\nthe worst five, and what their steps are taken to consist of:")
    for row, result, speed, _ in sorted(found, key=lambda f: -abs(f[2] or 0.0))[:5]:
        print(f"  {row['id']} {speed:+.0%} {row['model']}: {shares(result)}\n    {row['notes'][:180]}")
    print()
    ordered = pairs(rows)
    wrong = [
        (what, a["id"], b["id"]) for what, a, b in ordered if predicted(a).tokens_per_s <= predicted(b).tokens_per_s
    ]
    speeds = [speed for _, _, speed, _ in found if speed is not None]
    held_errors = [memory for _, _, _, memory in found if memory is not None]
    if speeds:
        say("throughput", summary(speeds))
    if held_errors:
        say("memory", summary(held_errors))
    if ordered:
        print(
            f"order        {len(ordered) - len(wrong)} of {len(ordered)} pairs that differ in one choice, by 3% or more"
        )
        for what, fast, slow in wrong:
            print(f"             not {what}: {fast} was faster than {slow}")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--cross-validate", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = read(options.rows)
    if options.cross_validate:
        speeds, held = cross_validate(rows)
        say("throughput", summary(speeds))
        say("memory", summary(held))
    elif options.fit:
        point = fit(rows)
        constants, devices = at(point)
        for key, value in point.items():
            print(f"{key:<40} {value:.2g}")
        say("throughput", summary([s for _, _, s, _ in evaluated(rows, constants, devices) if s is not None]))
    else:
        facts = table(rows)
        if options.json:
            options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
