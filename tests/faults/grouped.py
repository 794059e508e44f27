"""`python -m grouped GROUP LIGHTHOUSE NPROC RUN_DIR STEP_MS OVERRIDES...`: one group of a run, whose steps take a while."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from trainwright.launch.run import launch_local


def train(arguments: list[str]) -> int:
    """One rank."""
    import trainwright as tw

    class Slow(tw.Callback):
        """Time enough for a group to come back."""

        def on_step_end(self, loop: Any, record: Any) -> None:
            time.sleep(float(arguments[0]) / 1000)

    tw.run_training(tw.load_config(None, arguments[1:]), quiet=True, callbacks=[Slow()])
    return 0


if __name__ == "__main__":
    group, address, nproc, run_dir, *rest = sys.argv[1:]
    step_ms, *overrides = rest
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    overrides += [f"outer.group={group}", f"outer.lighthouse={address}", f"run_dir={run_dir}"]
    logs = f"{run_dir}/group-{group}/logs"
    sys.exit(launch_local([step_ms, *overrides], int(nproc), logs, entry="grouped:train"))
