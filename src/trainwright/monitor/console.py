"""What a person sees while a run trains: rank 0's live line; every other rank writes to its log file only.

On a terminal, one line with a progress bar is redrawn in place, and whatever is said (notes, evaluations, warnings,
library prints) scrolls above it. Elsewhere (a pipe, a log) a plain line is written every `every_s` seconds. All that
is said also goes to `run_dir/logs/rank-0.log`.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import words
from .metrics import EvaluationRecord, StepRecord

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

_RECENT_STEPS = 50  # time left is estimated from this many steps: short enough to follow a change of load
_REDRAW_S = 0.1


def log_path(run_dir: str | Path, rank: int) -> Path:
    """Where a rank writes what is not for the console."""
    return Path(run_dir) / "logs" / f"rank-{rank}.log"


class Console:
    """The run's voice. Every rank makes one; only rank 0's reaches the terminal.

    start(total_steps) → update(record) a step, evaluation(record), say(text) at any time → close().
    """

    def __init__(
        self,
        rank: int = 0,
        run_dir: str | Path | None = None,
        *,
        quiet: bool = False,
        every_s: float = 10.0,
        file: TextIO | None = None,
    ) -> None:
        """quiet: nothing on the terminal but warnings. every_s: seconds between plain lines where there is no terminal.

        file: instead of standard output.
        """
        self.rank = rank
        self._speaks = rank == 0
        self._quiet = quiet
        self._every_s = every_s
        self._out = file
        self._rich: RichConsole | None = None
        self._log: TextIO | None = None
        if run_dir is not None:
            path = log_path(run_dir, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a", encoding="utf-8", buffering=1)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total: int | None = None
        self._last: StepRecord | None = None
        self._written: StepRecord | None = None
        self._step_times_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._clock_s = self._shown_s = 0.0
        self._handler: _LogHandler | None = None
        self._old_showwarning = warnings.showwarning
        self._warned: set[str] = set()

    # --- the run ---------------------------------------------------------------------------------------------------
    def start(self, total_steps: int | None, done_steps: int = 0) -> None:
        """Begins the live line. total_steps: None while the horizon is not fixed yet. done_steps: where a resume is."""
        self._total = total_steps
        self._clock_s = time.monotonic()
        self._listen()
        if self._speaks and not self._quiet and self.rich.is_terminal:
            self._progress = _progress(self.rich)
            self._task = self._progress.add_task("", total=total_steps, completed=done_steps, facts="starting", left="")
            self._progress.start()
            self._progress.refresh()

    def set_total(self, total_steps: int) -> None:
        """Fixes the horizon of a run whose number of steps was found from its first steps."""
        self._total = total_steps
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total_steps)

    def update(self, record: StepRecord) -> None:
        """Shows a step. Cheap: redraws at most ten times a second, or writes a plain line every `every_s` seconds."""
        now_s = time.monotonic()
        self._step_times_s.append(now_s - self._clock_s)
        self._clock_s = now_s
        first = self._last is None
        self._last = record
        if self._progress is not None and self._task is not None:
            if first or now_s - self._shown_s >= _REDRAW_S or record.step == self._total:
                self._shown_s = now_s
                self._progress.update(
                    self._task, completed=record.step, facts=_facts(record, short=True), left=self._left()
                )
                self._progress.refresh()
        elif first or now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            self._plain_line()

    def evaluation(self, record: EvaluationRecord) -> None:
        """A line that stays: the held-out loss after a step."""
        parts = [f"step {record.step:,}", f"val loss {words.figure(record.val_loss)}"]
        if record.val_bits_per_byte is not None:
            parts.append(f"bits/byte {words.figure(record.val_bits_per_byte)}")
        if record.best:
            parts.append("best so far")
        self.say("evaluation  " + "  ".join(parts))

    def say(self, text: str, *, warning: bool = False) -> None:
        """A message above the live line (rank 0) and in the log. Text, not Rich markup."""
        self._write_log(("warning: " if warning else "") + text)
        if self._speaks and (warning or not self._quiet):
            from rich.text import Text

            # A Text and not print's `style`: that would colour the live line below as well.
            self.rich.print(Text(f"warning: {text}", style="yellow") if warning else Text(text))

    def close(self) -> None:
        """Ends the live line, leaving it as it stands, and closes the log; a second call does nothing."""
        if self._progress is not None:
            if self._last is not None and self._task is not None:
                self._progress.update(
                    self._task, completed=self._last.step, facts=_facts(self._last, short=True), left=""
                )
            self._progress.refresh()
            self._progress.stop()
            self._progress = None
        elif self._last is not None and self._last is not self._written:
            self._plain_line()
        self._unlisten()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- tables ----------------------------------------------------------------------------------------------------
    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A small table, in the log as well."""
        from rich import box
        from rich.table import Table

        lines = [[str(cell) for cell in row] for row in rows]
        self._write_log(title + "\n" + "\n".join("  " + "  ".join(row) for row in [list(columns), *lines]))
        if not self._speaks or self._quiet:
            return
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(name, overflow="fold")
        from rich.text import Text

        for row in lines:
            table.add_row(*(Text(cell) for cell in row))
        self.rich.print(table)

    def dtype_table(self, rows: Iterable[Sequence[object]]) -> None:
        """The number formats of a run. rows: (what, dtype, note), such as ("moments", "fp32", "exp_avg")."""
        self.table("Number formats", ("what", "dtype", "note"), rows)

    def resolved_config(self, values: Mapping[str, tuple[object, str]], *, defaults: bool = False) -> None:
        """The config as resolved. values: dotted key → (value, source). defaults: also those that nobody set."""
        rows = [(key, value, source) for key, (value, source) in values.items() if defaults or source != "default"]
        self.table("Config", ("key", "value", "from"), rows)

    # --- inside ----------------------------------------------------------------------------------------------------
    @property
    def rich(self) -> RichConsole:
        """The Rich console that everything is drawn on; made at first use."""
        if self._rich is None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=self._out or sys.stdout, soft_wrap=not _is_terminal(self._out or sys.stdout))
        return self._rich

    def _plain_line(self) -> None:
        record = self._last
        assert record is not None
        self._written = record
        total = f"/{self._total:,}" if self._total else ""
        left = self._left()
        line = f"step {record.step:,}{total}  {_facts(record, short=False)}" + (f"  {left}" if left else "")
        self._write_log(line)
        if self._speaks and not self._quiet:
            self.rich.print(line, markup=False, highlight=False)

    def _left(self) -> str:
        if self._total is None or self._last is None or not self._step_times_s:
            return ""
        mean_s = sum(self._step_times_s) / len(self._step_times_s)
        return f"{words.duration(max(self._total - self._last.step, 0) * mean_s)} left"

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _listen(self) -> None:
        """Warnings and log messages of every library go through `say`, so that they do not tear the live line."""
        if self._handler is None:
            self._handler = _LogHandler(self)
            logging.getLogger().addHandler(self._handler)
            self._old_showwarning = warnings.showwarning
            warnings.showwarning = self._warn

    def _unlisten(self) -> None:
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler = None
            if warnings.showwarning == self._warn:  # else someone else has set or restored it meanwhile
                warnings.showwarning = self._old_showwarning

    def _warn(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = f"{category.__name__}: {message}"
        if text not in self._warned:  # once, from wherever it comes
            self._warned.add(text)
            self.say(text, warning=True)


class _LogHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.say(record.getMessage().rstrip(), warning=record.levelno >= logging.WARNING)
        except Exception:
            self.handleError(record)


def _is_terminal(file: Any) -> bool:
    return bool(getattr(file, "isatty", lambda: False)())


def _facts(record: StepRecord, *, short: bool) -> str:
    """The figures of a step in one line."""
    parts = [f"loss {words.figure(record.loss)}"]
    if not short:
        parts.append(f"lr {record.lr:.2e}")
        if record.grad_norm is not None:
            parts.append(f"grad norm {words.figure(record.grad_norm, 3)}")
    parts.append(f"{words.count(record.tokens_per_s)} tokens/s")
    if record.mfu is not None:
        parts.append(f"MFU {words.percent(record.mfu)}")
    if record.skipped:
        parts.append(f"{record.skipped} skipped")
    return "  ".join(parts)


def _progress(console: RichConsole) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # No refresh thread: it would compete with the training threads, and a step redraws often enough.
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24 if console.width >= 100 else 10, complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.fields[facts]}", markup=False),
        TextColumn("{task.fields[left]}", style="dim", markup=False),
        console=console,
        auto_refresh=False,
    )
