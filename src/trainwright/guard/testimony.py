"""What a rank tells at a hearing: its position, the stack of its training thread, whether that waits."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainwright.guard.verdict import Report
from trainwright.ledger import here
from trainwright.position import Position
from trainwright.processes import ProcessId

# A thread waits where its innermost frames are these files of torch's, or a line that waits for the device.
_WAITING_FILES = ("distributed_c10d.py", "_functional_collectives.py", "_fsdp_collectives.py")
_WAITING_WORDS = ("wait_tensor(", ".wait()", ".wait_for_unshard(", ".tolist()", ".item()", "synchronize()")
_INNERMOST = 4


def testimony(thread: int) -> Report:
    """Of this rank. thread: the training thread's identifier."""
    position = here.position()
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    own = [f for f in stack if not _is_library(f.filename)]
    return Report(
        position,
        time.monotonic() - position.since,
        tuple(_frame(f) for f in stack[-8:]),
        _frame(own[-1]) if own else "",
        blocked=any(_waits(f) for f in stack[-_INNERMOST:]),
    )


def _waits(frame: traceback.FrameSummary) -> bool:
    return frame.filename.endswith(_WAITING_FILES) or any(word in (frame.line or "") for word in _WAITING_WORDS)


def _is_library(filename: str) -> bool:
    package = str(Path(__file__).parents[1])
    return filename.startswith((package, "<")) or "site-packages" in filename or "/lib/python" in filename


def _frame(frame: traceback.FrameSummary) -> str:
    code = f": {frame.line.strip()}" if frame.line else ""
    return f"{frame.filename}:{frame.lineno} in {frame.name}{code}"[:160]


def encoded(report: Report) -> dict[str, Any]:
    """As JSON."""
    return asdict(report)


def decoded(data: dict[str, Any]) -> Report:
    """`encoded`, back."""
    place = data["position"]
    position = Position(
        **(place | {"last_collectives": tuple(place["last_collectives"]), "process": ProcessId(**place["process"])})
    )
    return Report(**(data | {"position": position, "frames": tuple(data["frames"])}))
