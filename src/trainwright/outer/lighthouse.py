"""`trainwright lighthouse`: where groups meet. torchft's server: heartbeats, and who takes part in the next outer step."""

from __future__ import annotations

import signal
import threading
from typing import Any

from trainwright.errors import LaunchError

DEFAULT_PORT = 29510
_TICK_MS = 100


def start_lighthouse(bind: str, *, min_groups: int, patience_s: float, heartbeat_timeout_s: float) -> Any:
    """A running server; its `shutdown()` ends it. bind: host:port, of the interface that groups reach.

    patience_s: how long groups that are ready wait for one that lives and is not. Raises LaunchError for a port in use.
    """
    from torchft.coordination import LighthouseServer

    try:
        return LighthouseServer(
            bind=bind,
            min_replicas=min_groups,
            join_timeout_ms=int(patience_s * 1000),
            quorum_tick_ms=_TICK_MS,
            heartbeat_timeout_ms=int(heartbeat_timeout_s * 1000),
        )
    except Exception as error:
        raise LaunchError(
            f"a lighthouse on {bind}: {error}", "the port is free, and the address this host's", "--bind 0.0.0.0:29510"
        ) from error


def serve(bind: str, *, min_groups: int, patience_s: float, heartbeat_timeout_s: float) -> None:
    """Until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = start_lighthouse(
        bind, min_groups=min_groups, patience_s=patience_s, heartbeat_timeout_s=heartbeat_timeout_s
    )
    print(f"lighthouse on {bind}; groups: outer.lighthouse=THIS_HOST:{bind.rpartition(':')[2]}", flush=True)
    stop.wait()
    server.shutdown()
