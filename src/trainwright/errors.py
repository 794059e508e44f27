"""The errors that Trainwright raises on purpose.

    TrainwrightError                    everything below; always says got / rule / remedy
    ├── ConfigError (ValueError)        a value, a key or a combination in the config
    │   ├── UnknownKeyError             a key that the schema does not have; names the nearest one
    │   └── ContradictionError          two values that cannot hold together
    ├── UsageError (ValueError)         the Python calls in an order that has no meaning
    ├── ModelError (ValueError)         a model, layer or parameter that the strategy cannot take
    ├── DataError (ValueError)          a source, a tokenizer or a token data set
    │   └── DataVersionError            the data set is not the one that the run was trained on
    ├── CheckpointError (ValueError)    a checkpoint that is missing, damaged or of something else
    ├── StorageError (ValueError)       an object store that cannot be reached, refuses
    │   └── DamagedObjectError          an object that is missing, cut short or changed
    ├── LaunchError (ValueError)        the launcher's variables, the backend, the device
    ├── NumericsError (ValueError)      non-finite values beyond the limit
    └── StuckError (RuntimeError)       ranks that wait for each other in vain

Users see three facts: what was *got*, the *rule* it breaks, and a *remedy* with a value that works. Broken
invariants inside the package are `assert`s with a message, never one of these.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContradictionError",
    "DamagedObjectError",
    "DataError",
    "DataVersionError",
    "LaunchError",
    "ModelError",
    "NumericsError",
    "StorageError",
    "StuckError",
    "TrainwrightError",
    "UnknownKeyError",
    "UsageError",
]


class TrainwrightError(Exception):
    """Base of all deliberate errors: `got` is what was found, `rule` what must hold, `remedy` what works."""

    def __init__(self, got: str, rule: str = "", remedy: str = "") -> None:
        self.got = got
        self.rule = rule
        self.remedy = remedy
        lines = [got]
        if rule:
            lines.append(f"  rule:   {rule}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # Errors cross process boundaries (spawned test ranks, tokenizer workers): keep the three parts apart.
        return type(self), (self.got, self.rule, self.remedy)


class ConfigError(TrainwrightError, ValueError):
    """A value, a key or a combination in the config."""


class UnknownKeyError(ConfigError):
    """A key that the schema does not have."""


class ContradictionError(ConfigError):
    """Two values that cannot hold together."""


class UsageError(TrainwrightError, ValueError):
    """The engine's calls in an order that has no meaning."""


class ModelError(TrainwrightError, ValueError):
    """A model, layer or parameter that the strategy cannot take."""


class DataError(TrainwrightError, ValueError):
    """A source, a tokenizer or a token data set."""


class DataVersionError(DataError):
    """The data set is not the one that the run was trained on."""


class CheckpointError(TrainwrightError, ValueError):
    """A checkpoint that is missing, damaged or of something else."""


class StorageError(TrainwrightError, ValueError):
    """An object store that cannot be reached, or refuses."""


class DamagedObjectError(StorageError):
    """An object that is missing, cut short or changed."""


class LaunchError(TrainwrightError, ValueError):
    """The launcher's variables, the backend or the device."""


class NumericsError(TrainwrightError, ValueError):
    """Non-finite values beyond the limit."""


class StuckError(TrainwrightError, RuntimeError):
    """Ranks that wait for each other in vain. The watchdog ends the processes with it: nobody can catch it."""
