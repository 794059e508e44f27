"""Groups of ranks joined by slow links: outer steps between them (docs/slow_links.md)."""

import importlib.util
import logging
import os

from trainwright.errors import ConfigError

# torchft tells every heartbeat that fails and every peer that dies, with tracebacks; what matters of it is told in the run.
# Its Rust side reads RUST_LOG when it is imported, which every module here does after this.
os.environ.setdefault("RUST_LOG", "error")
logging.getLogger("torchft").setLevel(logging.CRITICAL)


def check_installed() -> None:
    """Raises ConfigError where torchft is missing. Imports nothing."""
    if importlib.util.find_spec("torchft") is None:
        raise ConfigError(
            "outer.groups > 1, but the package torchft is not installed",
            "groups over slow links stand on torchft, which comes with the extra `slow-links`",
            "pip install 'trainwright[slow-links]'",
        )
