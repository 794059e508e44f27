"""`plan --hardware 2xcpu`: the strategies on this machine's own processors, for people and for machines."""

from __future__ import annotations

from typing import Any

from trainwright.monitor.words import byte_size, duration
from trainwright.planner.choose import Chosen, Way, Ways
from trainwright.planner.room import Room
from trainwright.planner.show_dry_run import drawn


def as_json(ways: Ways, chosen: Chosen, room: Room) -> dict[str, Any]:
    """Plain data; sizes in bytes, times in seconds."""
    return {
        "ranks": ways.machines.world_size,
        "memory_limit_bytes": room.memory_bytes,
        "chosen": chosen.changes,
        "strategies": [_facts(way) for way in ways.looked_at()],
    }


def _facts(way: Way) -> dict[str, Any]:
    time = way.forecast.time
    return {
        "zero": way.stage,
        "micro_size": way.micro_size,
        "accumulation": way.accumulation,
        "recompute": way.recompute,
        "step_time_s": way.seconds,
        "parts_s": vars(time) if time is not None else {},
        "memory_bytes": way.forecast.memory_bytes,
        "memory": {row.kind: row.at_peak_bytes for row in way.forecast.run.memory},
    }


def show(ways: Ways, chosen: Chosen, room: Room, explain: bool) -> None:
    """Prints them, the fastest first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rates = ways.rates
    assert rates is not None, "on this machine rates are measured"
    console.print(f"{ways.machines.world_size} rank(s) of {rates.threads} thread(s) on {rates.machine}; {room.where}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("strategy", "a step", "tokens/s", "memory a rank", "of it states", "transfers"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    length = ways.resolved.config.data.sequence_length
    for way in ways.looked_at():
        time = way.forecast.time
        assert time is not None
        states = sum(r.at_peak_bytes for r in way.forecast.run.memory if r.kind in ("parameters", "optimizer"))
        table.add_row(
            way.describe(),
            duration(way.seconds),
            f"{ways.rows * ways.replicas * length / way.seconds:,.0f}",
            byte_size(way.forecast.memory_bytes),
            byte_size(states),
            f"{time.communication / time.total:.0%}",
        )
    console.print(table)
    console.print(f"\ntake {chosen.why}")
    if chosen.changes:
        console.print("  " + " ".join(f"{key}={value}" for key, value in chosen.changes.items()))
    if explain and chosen.forecast is not None and chosen.forecast.time is not None:
        _explain(console, chosen)


def _explain(console: Any, chosen: Chosen) -> None:
    forecast = chosen.forecast
    assert forecast is not None
    assert forecast.time is not None
    console.print("\nwhere a step's time goes")
    for part, seconds in sorted(vars(forecast.time).items(), key=lambda item: -item[1]):
        console.print(f"  {part:14} {seconds * 1e3:9.1f} ms  {seconds / forecast.time.total:5.0%}")
    console.print("what a rank holds at the peak, without what the process and its heap take besides")
    for row in sorted(forecast.run.memory, key=lambda row: -row.at_peak_bytes):
        if row.at_peak_bytes:
            console.print(f"  {row.kind:18} {byte_size(row.at_peak_bytes):>10}")
    console.print("that memory over a step (of many micro-batches three)")
    for line in drawn(forecast.run.timeline):
        console.print(line)
