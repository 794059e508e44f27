"""report.html without a browser: what is in it, all escaped, nothing fetched, and long runs stay small."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import record

from trainwright.errors import DataError
from trainwright.monitor.curves import MAX_POINTS, curves_of, smooth, thin
from trainwright.monitor.metrics import EvaluationRecord, Metrics, MetricsWriter, write_summary
from trainwright.monitor.report import write_report

CONFIG = """\
zero:
  stage: 2  # override
optimizer:
  lr: 0.02  # file <b>run.yaml</b>
  name: adamw  # default
run_dir: runs/x  # override
"""


def write_run(folder: Path, steps: int = 30) -> Path:
    writer = MetricsWriter(folder)
    for step in range(1, steps + 1):
        writer.step(record(step, grad_norm=math.inf if step == 7 else 0.5, skipped=int(step >= 7)))
        if step % 10 == 0:
            writer.evaluation(EvaluationRecord(step, 3.0 - step / 30, 2.0 - step / 60))
    writer.close()
    (folder / "config.yaml").write_text(CONFIG)
    samples = [
        {"prompt": "<b>KING</b>", "text": "<b>KING</b> hello <script>alert(1)</script>", "settings": "t=0.8"},
        "</script><img src=x onerror=alert(2)>",
    ]
    data = {"name": "plays & more", "tokens": 1234567, "splits": {"train": 1_000_000, "heldout": 234_567}}
    write_summary(
        folder, {"name": "<i>run</i>", "status": "finished", "parameters": 5.6e6, "data": data, "samples": samples}
    )
    return write_report(folder)


def without_plotly(page: str) -> str:
    """The page but for the largest script, which is plotly.js."""
    return page.replace(max(re.findall(r"<script>.*?</script>", page, re.S), key=len), "")


def test_the_page_holds_what_it_should(tmp_path: Path) -> None:
    page = without_plotly(write_run(tmp_path).read_text(encoding="utf-8"))
    for text in (
        "Bits per byte",
        "1.500",
        "5.6M parameters",
        "1,234,567",
        "zero.stage",
        "1 skipped",
        "plays &amp; more",
    ):
        assert text in page, text
    for chart in ("loss", "bits", "norm", "lr", "speed", "memory"):
        assert f"id=plot-{chart}" in page
    table = page[page.index("<h2>Config") : page.index("<details")]
    assert "optimizer.lr" in table
    assert "optimizer.name" not in table  # a default: only in the full text


def test_everything_is_escaped(tmp_path: Path) -> None:
    page = without_plotly(write_run(tmp_path).read_text(encoding="utf-8"))
    for text in ("<b>", "<i>run", "<script>alert", "<img"):
        assert text not in page, text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = without_plotly(write_run(tmp_path).read_text(encoding="utf-8"))
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page


def test_the_data_is_strict_json_without_a_gap_filled(tmp_path: Path) -> None:
    page = write_run(tmp_path).read_text(encoding="utf-8")
    found = re.search(r"<script type=application/json id=curves>(.*?)</script>", page, re.S)
    assert found
    charts = {chart["id"]: chart for chart in json.loads(found[1])}
    norm = charts["norm"]["curves"][0]
    assert norm["y"][norm["x"].index(7)] is None
    assert charts["bits"]["curves"][0]["x"] == [10, 20, 30]


def test_a_run_without_steps_and_without_summary(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).close()
    assert "No step was recorded" in write_report(tmp_path).read_text(encoding="utf-8")


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_report(tmp_path)


def test_long_runs_are_thinned_and_keep_their_spikes() -> None:
    steps = [record(step, grad_norm=50.0 if step == 12_345 else 0.5).as_dict() for step in range(1, 20_001)]
    for chart in curves_of(Metrics({}, steps, [])):
        for curve in chart["curves"]:
            assert len(curve["x"]) == len(curve["y"]) <= MAX_POINTS
            assert curve["x"] == sorted(curve["x"])
    norm = next(chart for chart in curves_of(Metrics({}, steps, [])) if chart["id"] == "norm")
    assert max(norm["curves"][0]["y"]) == 50.0


numbers = st.one_of(st.none(), st.floats(-1e6, 1e6))


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_extremes_and_the_order(y: list[float | None], limit: int) -> None:
    x = [float(i) for i in range(len(y))]
    thin_x, thin_y = thin(x, y, limit)
    assert len(thin_x) == len(thin_y) <= max(limit, 0) or len(y) <= limit
    assert thin_x == sorted(set(thin_x))
    assert all(y[int(at)] == value for at, value in zip(thin_x, thin_y, strict=True))
    known = [value for value in y if value is not None]
    if known:
        kept = [value for value in thin_y if value is not None]
        assert (min(kept), max(kept)) == (min(known), max(known))


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, max_size=80), st.integers(1, 30))
def test_smoothing_stays_within_the_values_and_keeps_gaps(y: list[float | None], width: int) -> None:
    smoothed = smooth(y, width)
    assert [value is None for value in smoothed] == [value is None for value in y]
    known = [value for value in y if value is not None]
    for value in smoothed:
        assert value is None or min(known) - 1e-3 <= value <= max(known) + 1e-3


def test_smoothing_does_not_lag() -> None:
    assert smooth([float(i) for i in range(50)], 9) == pytest.approx([float(i) for i in range(50)])
