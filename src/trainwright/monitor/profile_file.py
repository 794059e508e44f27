"""run_dir/profile/profile.json: where traced steps' time and memory went. Imports no torch: the report reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "profile"
PROFILE_FILE = "profile.json"


def write_profile(folder: Path, found: Mapping[str, Any]) -> None:
    """Into `folder`, which exists."""
    (folder / PROFILE_FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")


def read_profile(run_dir: Path) -> dict[str, Any] | None:
    """profile.json of a run; None where no step was traced, or the file is not whole."""
    try:
        found = json.loads((run_dir / FOLDER / PROFILE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
