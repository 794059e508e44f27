"""`outer.jsonl` in a group's folder: a line for each outer step, so that what was trained on can be told exactly.

A group's cursor in the order of the data stands in the line: everything before it has gone into the synchronised
weights, each sample once. A group that comes back goes on from its last cursor that the others saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUTER_FILE = "outer.jsonl"


class Diary:
    """Appends to the file, on rank 0; elsewhere (None) it keeps nothing."""

    def __init__(self, run_dir: Path | None) -> None:
        self._path = None if run_dir is None else run_dir / OUTER_FILE

    def line(self, kind: str, **values: Any) -> None:
        """kind: step (an outer step landed), catch_up (this group came back), start (a launch)."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")


def read_diary(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines; a last one that is not whole is left out."""
    path = Path(run_dir) / OUTER_FILE
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def as_text(cursors: Mapping[int, tuple[int, int]]) -> dict[str, list[int]]:
    """group -> [step, position], as JSON has it."""
    return {str(group): list(cursor) for group, cursor in sorted(cursors.items())}
