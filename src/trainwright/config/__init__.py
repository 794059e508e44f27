"""The config: schema, loading, contradictions, other frameworks' words. Imports no torch."""

from trainwright.config.load import Resolved, load_config
from trainwright.config.schema import Config

__all__ = ["Config", "Resolved", "load_config"]
