"""Trainwright trains language models, from a laptop to a cluster, with one engine.

    import trainwright as tw

    engine = tw.initialize(model=model, config="run.yaml")
    loss = engine(input_ids, labels=labels).loss
    engine.backward(loss)
    engine.step()

Names are imported when they are first used: importing the package imports nothing heavy and does nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright import losses as losses
    from trainwright import planner as planner
    from trainwright.callbacks import Callback as Callback
    from trainwright.config import Config as Config
    from trainwright.config import load_config as load_config
    from trainwright.data import Batch as Batch
    from trainwright.engine import Engine as Engine
    from trainwright.generate import GenerationSettings as GenerationSettings
    from trainwright.initializing import initialize as initialize
    from trainwright.loading import data_loader as data_loader
    from trainwright.loading import even as even
    from trainwright.training_run import run_training as run_training
    from trainwright.verification.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "Batch": "data",
    "Callback": "callbacks",
    "Config": "config",
    "Engine": "engine",
    "GenerationSettings": "generate",
    "data_loader": "loading",
    "even": "loading",
    "initialize": "initializing",
    "load_config": "config",
    "run_training": "training_run",
    "verify": "verification.verify",
}
_MODULES = ("distributed", "errors", "losses", "planner")

__all__ = [
    "Batch",
    "Callback",
    "Config",
    "Engine",
    "GenerationSettings",
    "__version__",
    "data_loader",
    "even",
    "initialize",
    "load_config",
    "run_training",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"trainwright.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'trainwright' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trainwright.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
