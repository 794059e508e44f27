"""`plan --html`: the trade-off between memory and speed as a page that needs no network."""

from __future__ import annotations

from dataclasses import fields
from html import escape
from typing import Any

from trainwright.dry_run.live_bytes import KINDS
from trainwright.dry_run.run import DryRun
from trainwright.monitor.words import count
from trainwright.planner.explain import advice, describe, overrides, recommended
from trainwright.planner.memory import GIB
from trainwright.planner.search import Candidate, Found
from trainwright.planner.sensitivity import sensitivity

_POINTS = 1500
"""Of each kind of strategy: the fastest."""
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1f2430}
code{background:#f1f3f6;padding:.15rem .35rem;border-radius:4px}table{border-collapse:collapse}td,th{padding:.25rem .8rem .25rem 0;
text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}h2{margin-top:2rem;font-size:1.1rem}"""


def page(found: Found, run: DryRun | None = None) -> str:
    """The page as text: every strategy that fits, the best of each kind by time and by memory, the memory of rank 0 over a step
    (by `run`, a dry run of the plan to take), and what to relax first."""
    import plotly.graph_objects as go

    job, taken = found.job, recommended(found)
    title = (
        f"{count(job.shape.parameters)} parameters on {job.cluster.ranks:,} x {job.cluster.device.name}, "
        f"{job.global_batch:,} x {job.sequence_length:,} tokens a step"
    )
    figures = [_trade_off(go, found, taken), _times(go, found), _memories(go, found)]
    figures += [_over_a_step(go, run)] if run is not None else []
    plots = "".join(figure.to_html(full_html=False, include_plotlyjs=i == 0) for i, figure in enumerate(figures))
    words = " ".join(overrides(taken.plan, job)) if taken is not None else ""
    head = f"<p><b>{escape(describe(taken.plan))}</b><br><code>{escape(words)}</code></p>" if taken is not None else ""
    rows = "".join(
        f"<tr><td>{escape(r.what)}</td><td class=n>{r.gain:+.1%}</td><td>{escape(r.plan)}</td></tr>"
        for r in sensitivity(found)
    )
    table = (
        f"<h2>What to relax first</h2><table><tr><th></th><th>tokens/s a device</th><th>then</th></tr>{rows}</table>"
    )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{head}<p>{escape(advice(found, taken))}</p>{plots}{table if rows else ''}"
        f"<p>{found.looked_at:,} strategies looked at; the figures are predictions.</p></body></html>"
    )


def _trade_off(go: Any, found: Found, taken: Candidate | None) -> Any:
    """Memory and speed of every strategy that fits, a colour for each kind."""
    figure = go.Figure()
    by_kind: dict[str, list[Candidate]] = {}
    for candidate in found.best:
        by_kind.setdefault(candidate.kind, []).append(candidate)
    for kind, candidates in by_kind.items():
        shown = candidates[:_POINTS]
        figure.add_scatter(
            x=[c.memory.total / GIB for c in shown],
            y=[c.tokens_per_s / c.plan.ranks for c in shown],
            text=[describe(c.plan) for c in shown],
            mode="markers",
            name=kind,
            marker={"size": 6, "opacity": 0.6},
        )
    if taken is not None:
        figure.add_scatter(
            x=[taken.memory.total / GIB],
            y=[taken.tokens_per_s / taken.plan.ranks],
            text=[describe(taken.plan)],
            mode="markers",
            name="to take",
            marker={"size": 15, "symbol": "star", "color": "black"},
        )
    figure.add_vline(x=found.job.limit_bytes / GIB, line_dash="dot", annotation_text="what may be filled")
    figure.update_layout(title="Every strategy that fits", xaxis_title="GiB a device", yaxis_title="tokens/s a device")
    return figure


def _times(go: Any, found: Found) -> Any:
    """Where a step's time goes, the best of each kind."""
    kinds = {kind: c for kind, c in found.kinds.items() if c.step is not None}
    figure = go.Figure()
    some = next(iter(kinds.values()), None)
    for part in fields(some.step) if some is not None and some.step is not None else ():
        figure.add_bar(
            y=list(kinds), x=[getattr(c.step, part.name) for c in kinds.values()], name=part.name, orientation="h"
        )
    figure.update_layout(barmode="stack", title="Seconds of a step, the best of each kind", xaxis_title="s")
    figure.update_yaxes(autorange="reversed")
    return figure


def _memories(go: Any, found: Found) -> Any:
    """What a device holds, the best of each kind and what does not fit."""
    figure = go.Figure()
    some = next(iter(found.kinds.values()))
    for part in fields(some.memory):
        held = [getattr(c.memory, part.name) / GIB for c in found.kinds.values()]
        figure.add_bar(y=list(found.kinds), x=held, name=part.name, orientation="h")
    figure.add_vline(x=found.job.limit_bytes / GIB, line_dash="dot")
    figure.update_layout(barmode="stack", title="GiB a device, the best of each kind", xaxis_title="GiB")
    figure.update_yaxes(autorange="reversed")
    return figure


def _over_a_step(go: Any, run: DryRun) -> Any:
    """What rank 0 holds over the operators of a step, by kind."""
    figure = go.Figure()
    moments = run.timeline
    for kind, words in KINDS.items():
        held = [moment.by_kind.get(kind, 0) / GIB for moment in moments]
        if any(held):
            figure.add_scatter(
                y=held, name=words, stackgroup="kinds", mode="lines", line={"width": 0},
                text=[moment.phase for moment in moments],
            )  # fmt: skip
    figure.update_layout(
        title="Rank 0 over a step, a dry run", xaxis_title="moments at even distances in operators", yaxis_title="GiB"
    )
    return figure
