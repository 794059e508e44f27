"""Which modules are gathered together: the sharding units.

Found in this order: what the user names (`shard_units=`), the model's own `_no_split_modules` (our models and Hugging
Face's), else the members of `nn.ModuleList`s (or `nn.Sequential`s) that hold two or more modules of one class with
parameters. What is in no unit (embedding, final norm, head) belongs to the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from trainwright.errors import ModelError
from trainwright.parallel.pipeline.cut import held_elsewhere


def find_units(
    model: nn.Module, shard_units: Sequence[str | type[nn.Module]] | None = None
) -> list[tuple[str, nn.Module]]:
    """(name, module) of each unit, in module order, none inside another. Tied weights never straddle two units.

    Raises ModelError where an entry of `shard_units` matches nothing.
    """
    if shard_units is not None:
        units = _named_by_user(model, shard_units)
    else:
        classes = _no_split_classes(model)
        units = [(n, m) for n, m in model.named_modules() if n and type(m).__name__ in classes] if classes else []
        units = units or _repeated_members(model)
    units = [(name, module) for name, module in units if any(True for _ in module.parameters())]
    return _without_straddling_ties(model, _outermost(units))


def _no_split_classes(model: nn.Module) -> set[str]:
    found: set[str] = set()
    for module in model.modules():
        found.update(getattr(module, "_no_split_modules", None) or ())
    # Hugging Face lists e.g. T5Block, but embeddings too in a few models: those stay with the root.
    return {name for name in found if not name.endswith(("Embedding", "Embeddings"))}


def _named_by_user(model: nn.Module, shard_units: Sequence[str | type[nn.Module]]) -> list[tuple[str, nn.Module]]:
    units: list[tuple[str, nn.Module]] = []
    for entry in shard_units:
        matches = [
            (name, module)
            for name, module in model.named_modules()
            if name
            and (
                (isinstance(entry, type) and isinstance(module, entry))
                or (isinstance(entry, str) and (type(module).__name__ == entry or fnmatchcase(name, entry)))
            )
        ]
        if not matches and not held_elsewhere(model):  # of a pipeline part's model the whole has been looked at
            classes = sorted({type(m).__name__ for n, m in model.named_modules() if n})
            raise ModelError(
                f"shard_units entry {entry!r} matches no module",
                "an entry is a class, a class name, or a pattern over module names",
                f"one of the model's classes: {', '.join(classes[:12])}",
            )
        units.extend(matches)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(set(units), key=lambda unit: order[unit[0]])


def _repeated_members(model: nn.Module) -> list[tuple[str, nn.Module]]:
    units: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
        repeated = {kind for kind, count in Counter(type(m) for _, m in members).items() if count > 1}
        units.extend((f"{name}.{n}" if name else n, m) for n, m in members if type(m) in repeated)
    return units


def _outermost(units: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    kept: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    for name, module in units:
        if id(module) in seen or any(name.startswith(outer + ".") for outer, _ in kept):
            continue
        # A ModuleList has no forward of its own; FSDP's hooks would never run.
        seen.add(id(module))
        kept.append((name, module))
    return kept


def _without_straddling_ties(model: nn.Module, units: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Leaves out units that share a parameter with anything outside themselves."""
    holders: dict[int, set[str]] = {}
    names = [name for name, _ in units]
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((n for n in names if full_name.startswith(n + ".")), "")
        holders.setdefault(id(parameter), set()).add(unit)
    shared = {unit for held in holders.values() if len(held) > 1 for unit in held}
    return [(name, module) for name, module in units if name not in shared]
