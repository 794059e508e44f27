"""From the config's `model`, or a user's, to a module and to what fills it once it is sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from trainwright.checkpoint.export import rename_for
from trainwright.checkpoint.weights import initialise, load_pretrained
from trainwright.config.model_schema import ModelConfig
from trainwright.errors import ModelError
from trainwright.models import pretrained
from trainwright.models.build import build
from trainwright.models.deferred import build_on_meta, recipes_of

Model = nn.Module | Callable[[], nn.Module]
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


def module_of(model: Model, seed: int) -> nn.Module:
    """The user's module, or what a callable builds, on the meta device. Raises ModelError for what cannot be trained."""
    module = model if isinstance(model, nn.Module) else build_on_meta(model, seed)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model is a {type(module).__name__}", "a module, or a callable that builds one", "model=MyModel()"
        )
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise ModelError(
            f"{type(module).__name__} is sharded already", "an engine shards the model itself", "pass a new module"
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ModelError(
            f"{type(module).__name__} has no parameter to train", "at least one requires a gradient", "unfreeze one"
        )
    return module


def prepare_values(
    module: nn.Module, master: torch.dtype, device: torch.device, load_weights: Fill | None, initial: Fill
) -> Fill | None:
    """Masters in their format; rank 0's values on every rank. Returns what fills a model without values: `load_weights`,
    or else `initial`; None for a model with values. Collective. Raises ModelError."""
    on_meta = any(p.is_meta for p in module.parameters())
    if on_meta and not all(p.is_meta for p in module.parameters()):
        bad = next(name for name, p in module.named_parameters() if not p.is_meta)
        raise ModelError(
            f"some parameters are on the meta device, {bad} is not",
            "a model comes with all of its values, or with none",
            "pass a callable that builds it: model=lambda: MyModel()",
        )
    for _, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != master:
            parameter.data = parameter.data.to(master)
    if master == torch.float64:
        for owner in module.modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                if buffer.is_floating_point():
                    setattr(owner, name, buffer.to(torch.float64))
    if on_meta:
        if load_weights is None and not recipes_of(module):
            raise ModelError(
                f"{type(module).__name__} is on the meta device, its initial values are not known",
                "a model without values is built by a callable",
                "model=lambda: MyModel()",
            )
        return load_weights or initial
    module.to(device)
    if dist.get_world_size() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)
    return None
