"""The error file of a rank: the format of torch's elastic agent, which reads it after the rank's end.

Only the standard library is imported: a rank can fail before anything else is.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torch's elastic agent


def record_failure(error: BaseException, stack: str | None = None) -> None:
    """Writes this rank's error file, where a launcher asked for one: message, traceback, time, whether it is one of ours.

    stack: instead of the error's own traceback.
    """
    from .errors import TrainwrightError

    path = os.environ.get(ERROR_FILE)
    if not path or Path(path).exists():  # what came first stays: the rest follows from it
        return
    if stack is None:
        own = error.__traceback__.tb_next if error.__traceback__ else None  # the first frame is the worker's `main`
        stack = "".join(traceback.format_exception(type(error), error, own))
    extra = {
        "py_callstack": stack,
        "timestamp": str(int(time.time())),
        "time_s": time.time(),  # the agent's own timestamp is in whole seconds: too coarse to tell who failed first
        "deliberate": isinstance(error, TrainwrightError),
        "text": str(error),
    }
    data = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}
    Path(path).write_text(json.dumps(data), encoding="utf-8")
