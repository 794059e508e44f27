"""What `trainwright doctor` found, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. remedy: what to do about it, empty when there is nothing to do."""

    name: str
    status: Status
    text: str
    remedy: str = ""


def tell(findings: Sequence[Finding], as_json: bool) -> int:
    """Prints findings; 1 when one of them is `fail`, else 0."""
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    return int(any(finding.status == "fail" for finding in findings))


def show(findings: Sequence[Finding]) -> None:
    """Prints the findings, a remedy under what needs one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        mark, colour = _MARKS[finding.status]
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="dim")
        table.add_row(Text(mark, style=colour), Text(finding.name), text)
    console = Console()
    console.print(table)
    counts = {status: sum(f.status == status for f in findings) for status in _MARKS}
    console.print(f"\n{counts['ok']} ok, {counts['warn']} to know, {counts['fail']} to repair", highlight=False)
