"""Two runs in one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.errors import ConfigError
from trainwright.run_lock import only_run

HOLD = """
import sys
from pathlib import Path
from trainwright.run_lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "), only_run(tmp_path):
            pass
    finally:
        holder.kill()  # no clean-up of its own: the system releases the lock
        holder.communicate()
    with only_run(tmp_path):
        pass
    with only_run(tmp_path):
        pass
