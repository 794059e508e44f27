"""`report.html`: one page that shows what a run did. It needs no network: styles, script and plotly.js are inside.

Everything shown that came from outside (config, names, samples) is escaped, and the page's own content security
policy forbids it to load anything.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import words
from .curves import curves_of
from .machine import machine_facts
from .metrics import METRICS_FILE, Metrics, read_metrics, read_summary, strict_json
from .profile_file import read_profile

REPORT_FILE = "report.html"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_SETTING = re.compile(r"^(?P<indent> *)(?P<key>[\w-]+):(?: (?P<value>.*?))?(?:  # (?P<source>.*))?$")


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` from metrics.jsonl, config.yaml, summary.json and profile.json (but for the first
    they may be missing).

    Raises:
        DataError: metrics.jsonl is missing or damaged.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir / METRICS_FILE)
    config_path = run_dir / "config.yaml"
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    page = render(run_dir.absolute().name, metrics, read_summary(run_dir), config, read_profile(run_dir))
    path = run_dir / REPORT_FILE
    scratch = path.with_suffix(".tmp")
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
    return path


def render(
    run_name: str, metrics: Metrics, summary: Mapping[str, Any], config: str, profile: Mapping[str, Any] | None = None
) -> str:
    """The page as text. config: the resolved YAML, a value's source behind it as a comment. profile: of traced steps."""
    from plotly.offline import get_plotlyjs

    name = str(summary.get("name") or run_name)
    charts = curves_of(metrics)
    assets = files("trainwright.monitor") / "assets"
    body = [
        _header(name, summary),
        _tiles(metrics, summary),
        _charts(charts),
        _profile(profile or {}),
        _samples(summary.get("samples") or []),
        _facts_pair(summary),
        _config(config),
        f"<footer>Written by Trainwright {escape(machine_facts()['Trainwright'])}.</footer>",
    ]
    # "<" must not appear in a script element's data, or a text could end the element.
    data = json.dumps(strict_json(charts), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        '<meta name=color-scheme content="light dark">\n'
        f'<link rel=icon href="data:,">\n<title>{escape(name)} · Trainwright</title>\n'
        f"<style>\n{(assets / 'report.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script type=application/json id=curves>{data}</script>\n"
        f"<script>{get_plotlyjs()}</script>\n"
        f"<script>\n{(assets / 'report.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def _header(name: str, summary: Mapping[str, Any]) -> str:
    status = str(summary.get("status", ""))
    pill = f'<span class="status {escape(status)}">{escape(status)}</span>' if status else ""
    facts = [summary.get("strategy"), summary.get("precision"), summary.get("started_at")]
    if summary.get("parameters"):
        facts.insert(0, f"{words.count(summary['parameters'])} parameters")
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    return f"<header><h1>{escape(name)}{pill}</h1><p class=facts>{line}</p></header>"


def _tiles(metrics: Metrics, summary: Mapping[str, Any]) -> str:
    steps, evaluations = metrics.steps, metrics.evaluations
    final = {**(evaluations[-1] if evaluations else {}), **summary.get("final", {})}
    tiles: list[tuple[str, str, str]] = []
    if final.get("val_bits_per_byte") is not None:
        best = min(
            (e["val_bits_per_byte"] for e in evaluations if e.get("val_bits_per_byte") is not None), default=None
        )
        tiles.append(
            ("Bits per byte", words.figure(final["val_bits_per_byte"]), _best(best, final["val_bits_per_byte"]))
        )
    if final.get("val_loss") is not None:
        best = min((e["val_loss"] for e in evaluations if e.get("val_loss") is not None), default=None)
        tiles.append(("Held-out loss", words.figure(final["val_loss"]), _best(best, final["val_loss"])))
    if steps:
        recent = [row["loss"] for row in steps[-20:]]
        tiles.append(("Training loss", words.figure(statistics.fmean(recent)), f"mean of the last {len(recent)} steps"))
        last = steps[-1]
        skipped = f"{last['skipped']:,} skipped" if last.get("skipped") else ""
        tiles.append(("Steps", f"{last['step']:,}", skipped))
        tiles.append(("Tokens", words.count(last["tokens"]), "seen in training"))
        time_s = float(summary.get("training_time_s") or sum(row["step_time_s"] for row in steps))
        tiles.append(("Training time", words.duration(time_s), ""))
        speed = statistics.median(row["tokens_per_s"] for row in steps)
        tiles.append(("Speed", f"{words.count(speed)}/s", "tokens, median step"))
        shares = [row["mfu"] for row in steps if row.get("mfu") is not None]
        if shares:
            tiles.append(("MFU", words.percent(statistics.median(shares)), "of the peak matrix product"))
        peak_bytes = max(row.get("peak_memory_bytes") or 0 for row in steps)
        if peak_bytes:
            tiles.append(("Peak memory", words.byte_size(peak_bytes), "rank 0"))
    cells = [
        f"<div class=tile><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for title, value, note in tiles
    ]
    return f"<dl class=tiles>{''.join(cells)}</dl>" if cells else ""


def _best(best: float | None, last: float) -> str:
    return f"best {words.figure(best)}" if best is not None and best < last else "held-out, at the end"


def _charts(charts: Sequence[Mapping[str, Any]]) -> str:
    cards = []
    for chart in charts:
        legend = "".join(
            f'<span><i style="background:var({curve["colour"]})"></i>{escape(curve["name"])}</span>'
            for curve in chart["curves"]
        )
        shown = f"<span class=legend>{legend}</span>" if len(chart["curves"]) > 1 else ""
        cards.append(
            f'<section class="card chart" id=chart-{chart["id"]}><div class=head>'
            f"<h3>{escape(chart['title'])} <span class=unit>{escape(chart['unit'])}</span></h3>{shown}</div>"
            f"<div class=plot id=plot-{chart['id']}></div></section>"
        )
    if not cards:
        return "<h2>Curves</h2><p class=note>No step was recorded.</p>"
    return f"<h2>Curves <span class=unit>by optimizer step</span></h2><div class=charts>{''.join(cards)}</div>"


def _profile(profile: Mapping[str, Any]) -> str:
    """Where a traced step's time goes, as a bar and a table; beside it the dearest operators and memory by place."""
    try:
        step_ms = float(profile["step_ms"])
        parts = [(str(part["name"]), float(part["ms"])) for part in profile["parts"]]
        operators = [
            (str(o["name"])[:60], f"{float(o['ms']):,.1f} ms, {int(o['calls']):,} calls") for o in profile["operators"]
        ]
        memory = [(str(place["where"]), words.byte_size(float(place["bytes"]))) for place in profile["memory"]]
        hidden_ms, count = float(profile["hidden_communication_ms"]), int(profile["steps"])
    except (KeyError, TypeError, ValueError):
        return ""
    if step_ms <= 0 or not parts:
        return ""
    shown = [(name, ms) for name, ms in parts if ms > 0]
    bar = "".join(
        f'<i class="part p{index % 6}" style="width:{100 * ms / step_ms:.2f}%" title="{escape(name)}"></i>'
        for index, (name, ms) in enumerate(shown)
    )
    rows = "".join(
        f'<tr><th><i class="key p{index % 6}"></i>{escape(name)}</th><td>{ms:,.1f} ms</td><td>{ms / step_ms:.1%}</td></tr>'
        for index, (name, ms) in enumerate(shown)
    )
    if hidden_ms > 0:
        rows += f"<tr><th>communication hidden behind compute</th><td>{hidden_ms:,.1f} ms</td><td></td></tr>"
    return (
        f"<h2>Where a step's time goes <span class=unit>{step_ms:,.1f} ms, mean of {count} traced steps, rank 0</span></h2>"
        f"<div class=card><div class=bar>{bar}</div><table>{rows}</table></div>"
        f"<div class=pairs><div>{_block('Dearest operators', dict(operators))}</div>"
        f"<div>{_block('Memory, largest first', dict(memory))}</div></div>"
    )


def _samples(samples: Iterable[Any]) -> str:
    cards = []
    for sample in samples:
        fields = sample if isinstance(sample, Mapping) else {"text": sample}
        prompt, text = str(fields.get("prompt") or ""), str(fields.get("text") or "")
        if prompt and text.startswith(prompt):
            text = text[len(prompt) :]
        lead = f"<span class=prompt>{escape(prompt)}</span>" if prompt else ""
        note = f"<p class=note>{escape(str(fields['settings']))}</p>" if fields.get("settings") else ""
        cards.append(f'<article class="card sample"><div class=text>{lead}{escape(text)}</div>{note}</article>')
    return f"<h2>Samples</h2>{''.join(cards)}" if cards else ""


def _facts_pair(summary: Mapping[str, Any]) -> str:
    """The data set, and beside it, where there is room, the machine and where the time went."""
    timings = {str(name).capitalize(): words.duration(float(v)) for name, v in (summary.get("timings") or {}).items()}
    data = _block("Data set", _data_facts(summary.get("data") or {}))
    machine = _block("Machine", summary.get("machine") or machine_facts()) + _block("Time", timings)
    machine += _block("Planned and measured", _plan_facts(summary.get("plan") or {}))
    return f"<div class=pairs>{''.join(f'<div>{part}</div>' for part in (data, machine) if part)}</div>"


def _plan_facts(plan: Mapping[str, Any]) -> dict[str, str]:
    """Of a step: what the planner said before the run beside what the first steps took."""
    planned, measured = plan.get("planned") or {}, plan.get("measured") or {}
    facts: dict[str, str] = {}
    for key, title, show in (
        ("step_time_s", "Time of a step", words.duration),
        ("memory_bytes", "Memory of a rank, beyond the process", words.byte_size),
    ):
        if planned.get(key) and measured.get(key):
            told, found = float(planned[key]), float(measured[key])
            facts[title] = f"{show(told)} planned, {show(found)} measured ({told / found - 1:+.0%})"
    return facts


def _block(title: str, facts: Mapping[str, Any]) -> str:
    return f"<h2>{title}</h2><div class=card>{_table(facts.items())}</div>" if facts else ""


def _data_facts(data: Mapping[str, Any]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for key, value in data.items():
        title = str(key).replace("_", " ").capitalize()
        if key == "splits" and isinstance(value, Mapping):
            for split, tokens in value.items():
                facts[f"{str(split).capitalize()} split"] = (
                    f"{tokens:,} tokens" if isinstance(tokens, int) else str(tokens)
                )
        elif key == "version":
            facts[title] = str(value)[:16]  # a hash: enough of it to recognise
        else:
            facts[title] = f"{value:,}" if isinstance(value, int) else str(value)
    return facts


def _config(config: str) -> str:
    if not config:
        return ""
    chosen = [(key, value, source) for key, value, source in _settings(config) if source != "default"]
    rows = "".join(
        f"<tr><td class=code>{escape(key)}</td><td class=code>{escape(value)}</td>"
        f"<td class=from>{escape(source)}</td></tr>"
        for key, value, source in chosen
    )
    table = f"<table><tr><th>Key</th><th>Value</th><th>From</th></tr>{rows}</table>" if rows else ""
    return (
        f"<h2>Config</h2><div class=card>{table}"
        f"<details><summary>Everything, defaults included</summary><pre>{escape(config)}</pre></details></div>"
    )


def _settings(config: str) -> list[tuple[str, str, str]]:
    """Dotted key, value and source of each leaf of the YAML that says its sources; lists are left to the full text."""
    found: list[tuple[str, str, str]] = []
    path: list[tuple[int, str]] = []
    for line in config.splitlines():
        match = _SETTING.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        path = [(at, key) for at, key in path if at < indent]
        path.append((indent, match["key"]))
        if match["value"] and match["source"]:
            found.append((".".join(key for _, key in path), match["value"], match["source"]))
    return found


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return f"<table>{cells}</table>"
