"""How a verification is printed: a strategy's figures, the matrix row by row, its summary."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainwright.verification.report import Run, Verification

if TYPE_CHECKING:
    from trainwright.verification.matrix import Matrix

_WORDS = {"held": "[green]held[/]", "failed": "[bold red]FAILED[/]", "refused": "[dim]refused[/]"}


def _console() -> Console:
    """Wide enough for parameters' names where nobody looks at a terminal's edge."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=160)


def show_verification(found: Verification, console: Console | None = None) -> None:
    """One strategy: each format's steps and worst parameters, then the verdict."""
    console = console or _console()
    for run in found.runs:
        against = f"one unsharded process in {run.reference_dtype}"
        table = Table(title=f"{found.strategy}: in {run.dtype} beside {against}", title_justify="left")
        for column in ("step", "loss", "loss error", "global norm", "norm error", "gradient error", "worst parameter"):
            named = column == "worst parameter"
            table.add_column(column, justify="left" if named else "right", overflow="fold" if named else "ellipsis")
        for step in run.steps:
            table.add_row(
                str(step.step), f"{step.loss:.6f}", f"{step.loss_error:.1e}", f"{step.norm:.6f}", f"{step.norm_error:.1e}",
                f"{step.gradient_error:.1e}", escape(step.worst_parameter),
            )  # fmt: skip
        console.print(table)
        if run.parameters:
            console.print(_parameters(run))
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    for problem in found.problems:
        console.print(f"[bold red]{problem.kind}[/]: {escape(problem.what)}")
        if problem.layout:
            console.print(f"    {escape(problem.parameter or '')} lies on {escape(problem.layout)}")
    verdict = "every figure is within its tolerance" if found.ok else f"does not hold: {found.reason}"
    console.print(f"{_WORDS[found.status]}  {escape(verdict)} ({found.time_s:.1f} s)")


def _parameters(run: Run, most: int = 5) -> Table:
    ranked = sorted(run.parameters, key=lambda p: -p.gradient_error)
    title = f"{len(ranked)} parameters, those with the largest gradient errors"
    table = Table(title=title, title_justify="left", title_style="dim")
    for column in ("parameter", "gradient error", "cosine", "after the last step", "lies on"):
        named = column in ("parameter", "lies on")
        table.add_column(column, justify="left" if named else "right", overflow="fold" if named else "ellipsis")
    for one in ranked[:most]:
        value = "" if one.value_error is None else f"{one.value_error:.1e}"
        table.add_row(escape(one.name), f"{one.gradient_error:.1e}", f"{one.cosine:.9f}", value, escape(one.layout))
    return table


class MatrixProgress:
    """Rank 0's live view of a matrix: rows as they come, a bar below on a terminal."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self._stack = ExitStack()
        self._console = _console()
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> MatrixProgress:
        if self._active and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = self._stack.enter_context(Progress(*columns, console=self._console, transient=True))
            self._task = self._progress.add_task("verifying", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, row: Verification, done: int, total: int) -> None:
        """A row is finished."""
        if not self._active:
            return
        self._console.print(_row_text(row), soft_wrap=True)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)


def _row_text(row: Verification) -> str:
    figures = "  ".join(
        f"{run.dtype}: loss {run.loss_error:.0e}, gradient {0.0 if run.worst is None else run.worst.gradient_error:.0e}"
        for run in row.runs
    )
    text = f"{_WORDS[row.status]:<7}  {escape(row.name)}"
    if row.status == "held":
        return f"{text}  [dim]{figures}  {row.time_s:.1f} s[/]"
    return f"{text}  {escape(row.reason)}" + (f"  [dim]{escape(row.layout)}[/]" if row.layout else "")


def show_matrix(matrix: Matrix, console: Console | None = None) -> None:
    """The summary: rows by model, the worst figures of each format, refusals counted by their reason."""
    console = console or _console()
    by_model: dict[str, list[Verification]] = {}
    for row in matrix.rows:
        by_model.setdefault(row.name.split(":")[0], []).append(row)
    table = Table(title="summary", title_justify="left")
    for column in ("model", "held", "failed", "refused", "float64: worst loss", "worst gradient", "in parameter"):
        table.add_column(column, justify="left" if column in ("model", "in parameter") else "right")
    for model, rows in by_model.items():
        counts = [str(sum(r.status == s for r in rows)) for s in ("held", "failed", "refused")]
        proofs = [run for r in rows if r.status == "held" for run in r.runs if run.dtype == "fp64"]
        worst = max(
            (run.worst for run in proofs if run.worst is not None), key=lambda p: p.gradient_error, default=None
        )
        loss = f"{max(run.loss_error for run in proofs):.1e}" if proofs else ""
        table.add_row(model, *counts, loss, f"{worst.gradient_error:.1e}" if worst else "", worst.name if worst else "")
    console.print(table)
    _own_formats(matrix, console)
    for row in matrix.rows:
        if row.status == "failed":
            console.print(f"[bold red]FAILED[/] {escape(row.name)}: {escape(row.reason)}")
    more = f"; {matrix.larger} more need another number of ranks" if matrix.larger else ""
    console.print(
        f"{matrix.held} of {len(matrix.rows)} compositions held on {matrix.ranks} ranks, "
        f"{sum(r.status == 'refused' for r in matrix.rows)} refused by name{more}; {matrix.time_s:.0f} s"
    )


def _own_formats(matrix: Matrix, console: Console) -> None:
    for dtype in ("fp32", "bf16", "fp16"):
        runs = [run for row in matrix.rows if row.status == "held" for run in row.runs if run.dtype == dtype]
        if runs:
            first = max(run.steps[0].gradient_error for run in runs)
            tolerance = runs[0].tolerance
            console.print(
                f"{dtype} ({len(runs)} runs): worst loss {max(r.loss_error for r in runs):.1e} (allowed {tolerance.loss:.0e}), "
                f"worst first gradient {first:.1e} (allowed {tolerance.first_gradient:.1e})"
            )
