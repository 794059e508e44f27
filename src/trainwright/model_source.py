"""From the config's `model` to a module and to what fills it once it is sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from trainwright.checkpoint.export import rename_for
from trainwright.checkpoint.weights import initialise, load_pretrained
from trainwright.config.model_schema import ModelConfig
from trainwright.models import pretrained
from trainwright.models.build import build

Fill = Callable[[nn.Module], None]
"""Gives a sharded model its values. Collective."""


def model_for(model: ModelConfig, vocab_size: int | None = None) -> tuple[nn.Module, Fill | None]:
    """The config's model on the meta device, and what fills it: None for initial values, else pretrained ones."""
    module = build(model, vocab_size)
    if model.weights == "random":
        return module, None
    assert model.huggingface is not None, "the schema's check lets pretrained weights through only with huggingface"
    folder = pretrained.resolve_folder(model.huggingface)
    return module, lambda sharded: fill_pretrained(sharded, folder)


def fill_pretrained(module: nn.Module, folder: str | Path) -> None:
    """Reads a Hugging Face folder onto the shards of a Hugging Face model or of our transformer."""
    load_pretrained(module, folder, rename=rename_for(module), allow_unexpected=pretrained.ignored_when_loading(module))
    # A buffer that only an operation on a parameter gave its value stays to be made.
    initialise(module, seed=0, skip=[name for name, _ in module.named_parameters()])
