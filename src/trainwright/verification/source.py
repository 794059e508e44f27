"""The model to verify, as often as it is needed: for the strategy on the meta device, for the reference with values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trainwright.checkpoint.weights import initialise
from trainwright.config import Config
from trainwright.errors import ModelError, UsageError
from trainwright.freeze import freeze
from trainwright.model_source import Fill, fill_pretrained
from trainwright.models import pretrained
from trainwright.models.build import build, is_ours
from trainwright.models.deferred import build_on_meta
from trainwright.parallel.allocate import allocate


@dataclass(frozen=True)
class ModelSource:
    """Builds the model. `build` gives a new module each time, on the meta device with `fill` for its values, or whole."""

    build: Callable[[], nn.Module]
    fill: Fill | None = None
    """Pretrained values; None: the initial ones."""

    def for_strategy(self) -> nn.Module:
        """A new module, as `initialize` takes it."""
        return without_dropout(self.build())

    def for_reference(self, config: Config, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A new unsharded module with the same values, in `dtype` on `device`."""
        module = without_dropout(self.build())
        if any(p.is_meta for p in module.parameters()):
            allocate(module, torch.device("cpu"))
            (self.fill or (lambda m: initialise(m, config.seed)))(module)
        freeze(module, config.freeze)
        return module.to(device=device, dtype=dtype).train()

    @functools.cached_property
    def ours(self) -> bool:
        """Whether it is one of our models: float64 throughout when asked for, dropout by sample."""
        return is_ours(self.build())

    def vocab_size(self) -> int:
        """Entries of the model's embedding. Raises UsageError where none is found."""
        module = self.build()
        for owner in (module, getattr(module, "config", None)):
            size = getattr(owner, "vocab_size", None)
            if isinstance(size, int):
                return size
        embedding = next((m for m in module.modules() if isinstance(m, nn.Embedding)), None)
        if embedding is None:
            raise UsageError(
                f"{type(module).__name__} has no embedding",
                "synthetic batches are tokens; a model of other inputs brings its own",
                "verify(model, config, data=[Batch(...), ...])",
            )
        return embedding.num_embeddings


def source_of(model: nn.Module | Callable[[], nn.Module], seed: int) -> ModelSource:
    """Of a Python caller's model: a module (copied, it stays as it is), or a callable that builds one."""
    if isinstance(model, nn.Module):
        module = model
        return ModelSource(lambda: copy.deepcopy(module))
    build_module = model
    try:
        build_on_meta(build_module, seed)
    except ModelError:  # its constructor reads values: it is built whole, the same on every rank

        def whole() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return build_module()

        return ModelSource(whole)
    return ModelSource(lambda: build_on_meta(build_module, seed))


def source_of_config(config: Config, vocab_size: int | None, huggingface: object | None = None) -> ModelSource:
    """Of the config's `model`. `huggingface`: a config object in the place of the folder's (shrunk: random weights)."""
    model = config.model
    assert model is not None, "checked by the caller"
    if huggingface is not None:
        return ModelSource(lambda: pretrained.build_causal(huggingface))
    if model.weights == "random":
        return ModelSource(lambda: build(model, vocab_size))
    assert model.huggingface is not None, "the config's check lets pretrained weights through only with huggingface"
    folder = pretrained.resolve_folder(model.huggingface)
    return ModelSource(lambda: build(model, vocab_size), lambda module: fill_pretrained(module, folder))


def without_dropout(module: nn.Module) -> nn.Module:
    """Dropout off in a model that is not ours: its masks depend on the rank (DESIGN: numerics), a single process cannot
    draw them again. Ours draw them by sample, and keep it."""
    if not is_ours(module):
        for owner in module.modules():
            for name in has_dropout(owner):
                setattr(owner, name, 0.0)
    return module


def has_dropout(module: nn.Module) -> list[str]:
    """Attributes of one module (not its children) that set a dropout rate above 0."""
    words = [n for n in vars(module) if "dropout" in n or n.endswith("pdrop")]
    if isinstance(module, nn.modules.dropout._DropoutNd):
        words.append("p")
    return [n for n in words if isinstance(getattr(module, n), float) and getattr(module, n) > 0.0]
