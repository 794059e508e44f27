"""Gives a model its values where it is held: initial ones drawn by name, or a Hugging Face folder's, read in slices.

Both work on plain tensors and on the DTensors of `fully_shard`, on any mesh: a rank makes or reads only the rows that
it holds, and what it gets does not depend on the layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.checkpoint.safetensors_folder import SafetensorsFolder
from trainwright.errors import ModelError
from trainwright.models.deferred import build_on_meta, recipes_of
from trainwright.parallel.pipeline.cut import held_elsewhere
from trainwright.torch_private import compute_local_shape_and_global_offset

__all__ = ["LoadReport", "build_on_meta", "initialise", "load_pretrained", "local_part"]


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of `tensor`, and where that lies in the whole: (local tensor, a slice for each axis)."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


@torch.no_grad()
def initialise(module: nn.Module, seed: int, skip: Iterable[str] = ()) -> None:
    """Draws the initial values of a module of `models.deferred.build_on_meta`, once it is sharded and has memory.

    Values depend on `seed` and the parameters' names (the order of construction, for `orthogonal_` and the like),
    not on the layout; they are drawn in fp32 on the CPU and cast. skip: names that get their values elsewhere.
    Errors: ModelError for a parameter whose constructor gives it no value.
    """
    recipes, left_out = recipes_of(module), set(skip)
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in recipes}
    with torch.random.fork_rng(devices=[]):
        for name, tensor in tensors.items():
            if name in left_out:
                continue
            recipe = recipes.get(name)
            if recipe is None or recipe.empty:
                raise ModelError(
                    f"parameter {name}: no initial value is known",
                    "a model on the meta device comes from a callable whose constructor initialises every parameter",
                    "pass the callable, initialize(model=lambda: Net(...)), and initialise the parameter in Net"
                    " (torch.nn.init.normal_(self.weight))",
                )
            local, box = local_part(tensor)
            if local.numel():
                rows = recipe.rows(seed, name, box[0] if box else slice(0, 0))
                local.copy_(rows[(slice(None), *box[1:])] if box else rows)


@dataclass(frozen=True)
class LoadReport:
    """What a folder and a module did not have in common, by name."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@torch.no_grad()
def load_pretrained(
    module: nn.Module,
    folder: str | Path,
    rename: Callable[[str], str] | None = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> LoadReport:
    """Reads a Hugging Face folder's safetensors onto the parameters and persistent buffers of `module`.

    Each rank reads only its slice of each tensor, one tensor at a time, and converts it to the parameter's dtype.
    rename: from the name in the module to the name in the files; a base model's prefix (`model.`, `transformer.`) that
    one side lacks is bridged by itself, and a tied parameter is found under any of its names.
    allow_missing, allow_unexpected: shell-style patterns of names in the module / in the files that may lack a partner.
    Errors: ModelError naming what is missing, unexpected or of another shape, and for files that would be unpickled.
    """
    files = SafetensorsFolder(folder)
    names = _names_by_tensor(module)
    sources = {group[0]: _find(files, group, rename, _prefix(module)) for group in names.values()}
    mine = [*names.values(), list(held_elsewhere(module))]  # of a pipeline part's model, the files hold the whole
    used = {key for group in mine for key in _spellings(group, rename, _prefix(module))}
    missing = tuple(name for name, key in sources.items() if key is None and not _matches(name, allow_missing))
    unexpected = tuple(key for key in files.names if key not in used and not _matches(key, allow_unexpected))
    if missing or unexpected:
        raise ModelError(
            f"{files.folder}: missing {_listed(missing)}; unexpected {_listed(unexpected)}",
            "every parameter has a tensor in the files, and every tensor a parameter",
            "the folder of this very model, or patterns in allow_missing / allow_unexpected",
        )
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, key in sources.items():
        if key is not None:
            _read(files, key, name, tensors[name])
    absent = tuple(name for name, key in sources.items() if key is None)
    return LoadReport(absent, tuple(key for key in files.names if key not in used))


def _read(files: SafetensorsFolder, key: str, name: str, tensor: Tensor) -> None:
    if files.shape(key) != tuple(tensor.shape):
        raise ModelError(
            f"{name} has shape {tuple(tensor.shape)}, {key} in {files.folder} has {files.shape(key)}",
            "shapes agree",
            "the config that belongs to these weights",
        )
    local, box = local_part(tensor)
    if local.numel():
        files.read_into(key, box, local)


def _names_by_tensor(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and persistent buffer, by the tensor's identity."""
    tensors: list[tuple[str, Tensor]] = list(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                tensors.append((f"{prefix}.{name}" if prefix else name, buffer))
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors:
        groups.setdefault(id(tensor), []).append(name)
    return groups


def _prefix(module: nn.Module) -> str:
    prefix = getattr(module, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def _spellings(group: list[str], rename: Callable[[str], str] | None, prefix: str) -> list[str]:
    """The names under which a tensor of the module may lie in the files, most likely first."""
    spellings = []
    for name in group:
        key = rename(name) if rename is not None else name
        # Checkpoints of the first Hugging Face years say gamma and beta.
        old = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", key))
        for spelling in dict.fromkeys((key, old)):
            spellings.append(spelling)
            if prefix:
                other = spelling.removeprefix(prefix) if spelling.startswith(prefix) else prefix + spelling
                spellings.append(other)
    return spellings


def _find(files: SafetensorsFolder, group: list[str], rename: Callable[[str], str] | None, prefix: str) -> str | None:
    return next((key for key in _spellings(group, rename, prefix) if key in files.names), None)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: tuple[str, ...]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
