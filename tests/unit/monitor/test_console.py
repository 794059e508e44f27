"""The live line and its plain form."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from test_metrics import record

from trainwright.monitor import console as module
from trainwright.monitor.console import Console, log_path
from trainwright.monitor.metrics import EvaluationRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def strftime(self, _: str) -> str:
        return "now"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_plain_lines_come_every_so_often_and_the_last_at_the_end(tmp_path: Path, clock: Clock) -> None:
    out = io.StringIO()
    with Console(run_dir=tmp_path, every_s=10, file=out) as console:
        console.start(100)
        for step in range(1, 26):
            clock.now_s += 1
            console.update(record(step))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "11/100", "21/100", "25/100"]
    assert "tokens/s" in lines[0]
    assert "MFU 40.0%" in lines[0]
    assert "1:39 min left" in lines[0]
    assert "25/100" in log_path(tmp_path, 0).read_text()


def test_live_line_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    console = Console(file=out)
    console._rich = RichConsole(file=out, force_terminal=True, width=120)
    console.start(None)
    console.set_total(10)
    for step in range(1, 11):
        clock.now_s += 2
        console.update(record(step))
        if step == 5:
            console.say("[bold]not markup[/bold]")
            console.evaluation(EvaluationRecord(5, 2.5, 1.4, best=True))
    console.close()
    text = out.getvalue()
    assert "10/10" in text
    assert "[bold]not markup[/bold]" in text
    assert "bits/byte 1.400" in text
    assert "best so far" in text


def test_other_ranks_write_to_their_log_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Console(rank=3, run_dir=tmp_path) as console:
        console.start(10)
        console.update(record(1))
        console.say("rank 3 speaking", warning=True)
        console.table("Table", ("a", "b"), [(1, 2)])
    assert capfd.readouterr() == ("", "")
    text = log_path(tmp_path, 3).read_text()
    assert "rank 3 speaking" in text
    assert "Table" in text


def test_quiet_says_warnings_only() -> None:
    out = io.StringIO()
    with Console(quiet=True, file=out) as console:
        console.start(10)
        console.update(record(1))
        console.say("a note")
        console.say("trouble", warning=True)
    assert out.getvalue() == "warning: trouble\n"


def test_warnings_and_logs_go_through_it_until_it_closes() -> None:
    out = io.StringIO()
    handlers = list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        with Console(file=out) as console:
            console.start(10)
            logging.getLogger("some.library").warning("mind the gap")
            for _ in range(3):
                warnings.warn("old function", stacklevel=1)
        assert warnings.showwarning is shown
    assert "warning: mind the gap" in out.getvalue()
    assert out.getvalue().count("warning: UserWarning: old function") == 1
    assert logging.getLogger().handlers == handlers


def test_a_hook_that_someone_else_restored_is_left_alone() -> None:
    with warnings.catch_warnings():
        shown = warnings.showwarning
        console = Console(file=io.StringIO())
        console.start(10)
        warnings.showwarning = print  # type: ignore[assignment]
        console.close()
        assert warnings.showwarning is print
        warnings.showwarning = shown


def test_tables() -> None:
    out = io.StringIO()
    with Console(file=out) as console:
        console.dtype_table([("parameters", "fp32", "[red]master[/red]")])
        console.resolved_config({"zero.stage": (2, "override"), "seed": (0, "default")})
    text = out.getvalue()
    assert "[red]master[/red]" in text
    assert "zero.stage" in text
    assert "seed" not in text
