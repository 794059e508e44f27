"""Where groups and their lighthouse are reached."""

from __future__ import annotations

import socket

from trainwright.config.outer_schema import OuterConfig
from trainwright.errors import ConfigError


def own_address(settings: OuterConfig) -> str:
    """Where other groups reach this host: `outer.address`, or the address it has towards the lighthouse."""
    if settings.address is not None:
        return socket.gethostbyname(settings.address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect(endpoint(settings))
        return str(probe.getsockname()[0])


def endpoint(settings: OuterConfig) -> tuple[str, int]:
    """Host and port of the lighthouse. Raises ConfigError."""
    host, _, port = (settings.lighthouse or "").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"outer.lighthouse={settings.lighthouse}", "host:port, of IPv4", "outer.lighthouse=node0:29510"
        )
    return host, int(port)
