"""A search on the terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from trainwright.dry_run.run import DryRun
from trainwright.monitor.words import byte_size, count, duration
from trainwright.planner.explain import advice, breakdown, describe, overrides, recommended, why_not
from trainwright.planner.job import Job
from trainwright.planner.memory import GIB, memory
from trainwright.planner.replayed import replayed
from trainwright.planner.search import Candidate, Found
from trainwright.planner.sensitivity import sensitivity
from trainwright.planner.show_dry_run import drawn
from trainwright.planner.states import rank_states

_SHOWN = 5
"""Of the fastest."""


def show(found: Found, explain: bool = False, tokens: float | None = None, price: float | None = None) -> None:
    """Prints the plan to take, the fastest and each kind's best. tokens: of the whole run; price: of a device an hour."""
    from rich.console import Console

    console, job, taken = Console(highlight=False), found.job, recommended(found)
    device = job.cluster.device
    console.print(
        f"{count(job.shape.parameters)} parameters on {job.cluster.ranks:,} x {device.name} ({device.per_node} a node); a step of "
        f"{job.global_batch:,} x {job.sequence_length:,} tokens in {job.precision}; {found.looked_at:,} strategies looked at\n"
    )
    if taken is not None:
        console.print(f"[bold]take:[/bold] {describe(taken.plan)}")
        console.print("      " + " ".join(overrides(taken.plan, job)), soft_wrap=True)
    console.print(("why:  " if taken is not None else "") + advice(found, taken))
    if taken is not None and tokens is not None:
        console.print(f"for {count(tokens)} tokens: {_cost(taken, tokens, price)}")
    for note in job.notes:
        console.print(f"note: {note}")
    console.print()
    if taken is not None:
        console.print(
            _table(
                "the fastest",
                [(c, describe(c.plan), "the one to take" if c == taken else "") for c in found.best[:_SHOWN]],
            )
        )
        console.print()
    kinds = [(c, describe(c.plan), why_not(found, c, taken)) for c in found.kinds.values()]
    console.print(_table("the best of each kind", kinds))
    if explain and taken is not None:
        _explain(console, found, taken)
    console.print(
        "\nThroughput is tokens a second; how far predictions are from measurements: docs/planner.md.", style="dim"
    )


def _cost(taken: Candidate, tokens: float, price: float | None) -> str:
    seconds = tokens / taken.tokens_per_s
    hours = seconds / 3600 * taken.plan.ranks
    text = f"{duration(seconds)}, {hours:,.0f} device-hours"
    return text + (f", {hours * price:,.0f} at {price:g} an hour" if price is not None else "")


def _table(title: str, rows: list[tuple[Candidate, str, str]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title)
    for name in ("tokens/s/GPU", "step", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for candidate, text, remark in rows:
        speed = f"{candidate.tokens_per_s / candidate.plan.ranks:,.0f}" if candidate.step else "–"
        step = f"{candidate.step.total:.3g} s" if candidate.step else "–"
        table.add_row(text, speed, step, f"{candidate.memory.total / GIB:,.0f} GiB", remark)
    return table


def _explain(console: Any, found: Found, taken: Candidate) -> None:
    console.print("\nwhere a step's time goes")
    for what, seconds, share in breakdown(taken):
        if seconds:
            console.print(f"  {what:<40} {seconds:>9.3f} s {share:>5.0%}  {'█' * round(18 * share)}")
    console.print("\nwhat a rank holds at the peak")
    held = asdict(taken.memory)
    for name, size in sorted(held.items(), key=lambda item: -item[1]):
        if size:
            share = size / taken.memory.total
            console.print(f"  {name:<40} {size / GIB:>7.1f} GiB {share:>5.0%}  {'█' * round(18 * share)}")
    if (pipeline := replayed(found.job.shape, taken.plan, found.job.cluster.device)) is not None:
        assert taken.step is not None, "what is taken fits"
        console.print(
            f"\nthe pipeline's {pipeline.actions:,} forwards and backwards in the order of {taken.plan.pipeline_schedule}, replayed: the "
            f"ranks wait {pipeline.idle * pipeline.seconds:.3g} of {pipeline.seconds:.3g} s, for each other and for what is sent (by the "
            f"formula {taken.step.pipeline:.3g} s, behind the rank with most to do)"
        )
    if relaxed := sensitivity(found):
        console.print("\nwhat to relax first (tokens a second and device)")
        for one in relaxed:
            console.print(f"  {one.what:<40} {one.gain:>+6.1%}  {one.plan}", soft_wrap=True)
    kept = rank_states(found.job.shape, taken.plan)
    console.print(
        f"\nbetween two steps rank 0 keeps {kept.parameters:,} bytes of parameters and {kept.moments:,} of Adam's moments, "
        "padding included (of our transformer; the dry run below counts any model's)"
    )


def show_run(found: Found, run: DryRun) -> None:
    """The plan to take, as a dry run of its rank 0 has it: the model's real modules, on tensors without values."""
    from rich.console import Console

    console, taken = Console(highlight=False), recommended(found)
    assert taken is not None, "what is run dry is the plan to take"
    console.print(
        f"\nrank 0's memory over a step, by a dry run of the model's modules (which took {run.seconds_s:.0f} s)"
    )
    for line in drawn(run.timeline):
        console.print(line)
    kinds = {row.kind: row.between_steps_bytes for row in run.memory}
    console.print(
        f"between two steps it keeps {kinds.get('parameters', 0):,} bytes of parameters and {kinds.get('optimizer', 0):,} of the "
        f"optimizer's states; the peak, {byte_size(run.peak_bytes)}, is in {run.peak_phase}"
    )
    if taken.plan.compiled:
        held = memory(found.job.shape, replace(taken.plan, compiled=False))
        console.print(
            f"a dry run is not compiled, and keeps more: by the formulas {byte_size(int(held.total - held.buffers))} without compiling, "
            f"{byte_size(int(taken.memory.total - taken.memory.buffers))} with it (libraries' buffers left out)"
        )
    for note in run.notes:
        console.print(f"note: {note}")


def as_json(found: Found) -> dict[str, Any]:
    """The same for machines: seconds, bytes, tokens a second of all ranks."""
    taken = recommended(found)
    return {
        "parameters": found.job.shape.parameters,
        "device": found.job.cluster.device.name,
        "ranks": found.job.cluster.ranks,
        "looked_at": found.looked_at,
        "advice": advice(found, taken),
        "take": _facts(taken, found.job) if taken is not None else None,
        "best": [_facts(c, found.job) for c in found.best[:_SHOWN]],
        "kinds": {
            kind: _facts(c, found.job) | {"why_not": why_not(found, c, taken)} for kind, c in found.kinds.items()
        },
    }


def _facts(candidate: Candidate, job: Job) -> dict[str, Any]:
    step = candidate.step
    return {
        "plan": asdict(candidate.plan),
        "overrides": overrides(candidate.plan, job),
        "fits": step is not None,
        "tokens_per_s": candidate.tokens_per_s if step is not None else None,
        "step_s": step.total if step is not None else None,
        "step": asdict(step) if step is not None else None,
        "memory_bytes": candidate.memory.total,
        "memory": asdict(candidate.memory),
    }
