"""A dry run for people: tables, and its memory over the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainwright.dry_run.live_bytes import KINDS
from trainwright.dry_run.run import DryRun
from trainwright.dry_run.timeline import Moment
from trainwright.monitor.words import byte_size, count

_COLUMNS, _ROWS = 64, 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def show(result: DryRun) -> None:
    """Prints the dry run for people."""
    from rich.console import Console

    console = Console(highlight=False)
    place = ", ".join(f"{axis} {result.coordinates[axis]} of {n}" for axis, n in result.degrees.items() if n > 1)
    plan = result.plan
    console.print(f"rank {result.rank:,} of {result.world_size:,}: {place or 'alone'}")
    console.print(
        f"{count(result.parameters)} parameters, {count(result.rank_parameters)} on this rank; a step of "
        f"{plan.global_size:,} x {result.sequence_length:,} tokens, here {plan.accumulation} micro-batch(es) of "
        f"{plan.micro_size} x {result.sequence_length:,}\n"
    )
    memory = _table("bytes on this rank", "between steps", "at the update", "at the peak", "its own most")
    for row in result.memory:
        sizes = (row.between_steps_bytes, row.at_update_bytes, row.at_peak_bytes, row.largest_bytes)
        memory.add_row(KINDS[row.kind], *(byte_size(size) if size else "–" for size in sizes))
    memory.add_section()
    sums = (result.between_steps_bytes, result.at_update_bytes, result.peak_bytes)
    memory.add_row(f"all (peak in {result.peak_phase})", *map(byte_size, sums))
    console.print(memory)
    console.print()
    for line in drawn(result.timeline):
        console.print(line)
    console.print()
    collectives = _table("collectives of a step", "over", "ranks", "count", "size", "sent by this rank")
    for collective, times in result.collectives:
        collectives.add_row(
            collective.kind,
            collective.axis,
            f"{collective.ranks:,}",
            f"{times:,}",
            byte_size(collective.size_bytes),
            byte_size(collective.sent_bytes * times),
        )
    collectives.add_section()
    times = sum(times for _, times in result.collectives)
    collectives.add_row("all", "", "", f"{times:,}", "", byte_size(result.sent_bytes))
    console.print(collectives)
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(f"\n{result.seconds_s:.1f} s, {byte_size(result.process_memory_bytes)} of memory for this dry run")


def _table(first: str, *others: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "over" else "right")
    return table


def drawn(timeline: Sequence[Moment]) -> list[str]:
    """Lines of an area chart: bytes over the operators of a step, each column's fullest moment."""
    if not timeline:
        return []
    columns = min(_COLUMNS, len(timeline))
    parts = [timeline[i * len(timeline) // columns : (i + 1) * len(timeline) // columns] for i in range(columns)]
    fullest = [max(part, key=lambda moment: moment.total_bytes) for part in parts]
    peak = max(moment.total_bytes for moment in fullest) or 1
    lines = []
    for row in reversed(range(_ROWS)):
        heights = [8 * _ROWS * moment.total_bytes / peak - 8 * row for moment in fullest]
        area = "".join(_EIGHTHS[max(0, min(8, round(height)))] for height in heights)
        label = byte_size(peak * (row + 1) // _ROWS) if row in (_ROWS - 1, _ROWS // 2 - 1) else ""
        lines.append(f"{label:>10} │{area}")
    lines.append(f"{'':>10} └{''.join(moment.phase[0] for moment in fullest)}")
    lines.append(f"{'':>12}bytes over the operators of a step: f forward, b backward, u update")
    return lines
