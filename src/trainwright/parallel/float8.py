"""Linear layers whose products run in float8 (torchao; Micikevicius et al., FP8 formats, arXiv 2209.05433).

Inputs and weights are scaled into e4m3, gradients into e5m2, at every product; what lies in memory stays bf16 and fp32.
Only layers inside the model's blocks: embedding, head and norms stay in bf16, where a few bits cost most, as do
layers that float8 units cannot take (a side that is no multiple of 16).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trainwright.errors import ConfigError, ModelError

_SIDE = 16
_CAPABILITY = (8, 9)
"""Ada and Hopper: the first with float8 products."""


def apply_float8(
    units: Sequence[tuple[str, nn.Module]], recipe: str, device: torch.device, keep: Sequence[str] = ()
) -> list[str]:
    """Swaps the units' linear layers in place; names and parameters stay. Returns the names of those swapped.

    recipe: tensorwise (one scale a tensor) or rowwise (one a row: closer, slower). keep: name patterns left alone.
    Raises ConfigError where torchao or the device's units are missing, ModelError where no layer qualifies.
    """
    convert, config = _torchao(recipe, device)
    names: list[str] = []
    for unit_name, unit in units:

        def wanted(module: nn.Module, name: str, unit_name: str = unit_name) -> bool:
            full = f"{unit_name}.{name}"
            kept = any(fnmatchcase(full, pattern) or fnmatchcase(full, f"{pattern}.*") for pattern in keep)
            fits = isinstance(module, nn.Linear) and not (module.in_features % _SIDE or module.out_features % _SIDE)
            if fits and not kept:
                names.append(full)
            return fits and not kept

        convert(unit, module_filter_fn=wanted, config=config)
    if not names:
        raise ModelError(
            "precision.float8 on a model without a layer for it",
            f"linear layers inside its blocks, both sides multiples of {_SIDE}",
            "shard_units=['Block'] (the class of the blocks), or precision.float8=none",
        )
    return names


def _torchao(recipe: str, device: torch.device) -> tuple[Any, Any]:
    """torchao's conversion, and its settings."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise ConfigError(
            f"precision.float8={recipe} on {torch.cuda.get_device_name(device)}",
            "products in float8 need compute capability 8.9 or more (Ada, Hopper, Blackwell)",
            "precision.float8=none",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"precision.float8={recipe}: {error}",
            "the layers are torchao's",
            "pip install 'trainwright[gpu]', or precision.float8=none",
        ) from None
    config = Float8LinearConfig.from_recipe_name(recipe)
    if device.type != "cuda":
        warnings.warn(
            "precision.float8 on a device without float8 products: emulated (the numbers are right, nothing is faster)",
            stacklevel=3,
        )
        config = replace(config, emulate=True)
    return convert_to_float8_training, config
