"""`trainwright plan`: what a config asks of each rank. In this version as a dry run, without the search for a strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.cli_common import AsJson, Overrides, split
from trainwright.errors import ConfigError
from trainwright.monitor.words import byte_size, count

if TYPE_CHECKING:
    from trainwright.config import Resolved
    from trainwright.verification.dry_run.run import DryRun


def plan(
    arguments: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build one rank of the real strategy on fake tensors, and take a step.")
    ] = False,
    world_size: Annotated[int | None, typer.Option("--world-size", help="Number of ranks to stand for.")] = None,
    rank: Annotated[int, typer.Option("--rank", help="Which of them.")] = 0,
    as_json: AsJson = False,
) -> int:
    """Bytes that a rank would hold and collectives that a step would issue, with no machines.

    [dim]Such as:[/dim]  trainwright plan model.preset=llama-405b parallel.tensor=8 parallel.pipeline=16 zero=1
    precision=bf16 batch.micro_size=1 batch.accumulation=16 data.sequence_length=8192 --dry-run --world-size 16384
    """
    if not dry_run:
        raise ConfigError(
            "plan without --dry-run",
            "the search for a strategy comes in a later version; this one reckons the strategy that the config sets",
            "trainwright plan CONFIG.yaml --dry-run --world-size 8 --rank 0",
        )
    if world_size is None:
        raise ConfigError(
            "--dry-run without --world-size", "a dry run stands for one rank of so many", "--world-size 16384"
        )
    from trainwright.config import load_config

    file, overrides = split(arguments)
    resolved = load_config(file, overrides)
    from trainwright.verification.dry_run.run import dry_run as run

    result = run(resolved, world_size, rank, vocab_size=_vocabulary(resolved))
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        show(result)
    return 0


def _vocabulary(resolved: Resolved) -> int | None:
    """The data set's, where there is one already."""
    data = resolved.config.data
    paths = [data.path] if data.path else [entry.path for entry in data.mix]
    if not paths or not (Path(paths[0]).expanduser() / "manifest.json").is_file():
        return None
    from trainwright.data.shards import TokenDataset

    return TokenDataset.open(paths[0]).vocab_size


def show(result: DryRun) -> None:
    """Prints the dry run for people."""
    from rich.console import Console

    from trainwright.verification.dry_run.live_bytes import KINDS

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
