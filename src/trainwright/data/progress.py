"""Progress of a long command: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["ProgressReport"]

_LINE_EVERY_S = 10.0


class ProgressReport:
    """Use as a context; `update` with the bytes read so far. `shown`: None = a bar on a terminal, else lines."""

    def __init__(self, title: str, total_bytes: int, shown: bool | None = None) -> None:
        self.title, self.total_bytes = title, total_bytes
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None
        self._start_s = self._line_s = time.monotonic()

    def __enter__(self) -> ProgressReport:
        if self._shown is not False and sys.stderr.isatty():
            self._bar = self._make_bar()
            self._task = self._bar.add_task(self.title, total=self.total_bytes or None)
            self._bar.start()
        return self

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=Console(stderr=True), transient=True)

    def update(self, done_bytes: int) -> None:
        """Shows that `done_bytes` of the sources have been read."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=min(done_bytes, self.total_bytes) if self.total_bytes else done_bytes
            )
        elif self._shown is not False and time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            share = f" of {self.total_bytes / 1e6:,.0f}" if self.total_bytes else ""
            speed = done_bytes / 1e6 / (self._line_s - self._start_s)
            self.say(f"{self.title}: {done_bytes / 1e6:,.0f}{share} MB, {speed:.1f} MB/s")

    def say(self, line: str) -> None:
        """A line that stays (unless nothing is to be shown)."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._shown is not False:
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
