"""`python -m stopping STEP NPROC LOG_DIR OVERRIDES...`: a training run whose rank 0 sends itself SIGTERM after STEP."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from trainwright.launch.run import launch_local


def train(arguments: list[str]) -> int:
    """One rank."""
    import trainwright as tw
    from trainwright import distributed

    class Stop(tw.Callback):
        def on_step_end(self, loop: Any, record: Any) -> None:
            if record.step == int(arguments[0]) and distributed.is_main():
                os.kill(os.getpid(), signal.SIGTERM)

    result = tw.run_training(tw.load_config(None, arguments[1:]), callbacks=[Stop()])
    assert result.status == "stopped", result.status
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    step, nproc, log_dir, *overrides = sys.argv[1:]
    sys.exit(launch_local([step, *overrides], int(nproc), log_dir, entry="stopping:train"))
