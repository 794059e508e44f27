"""THE ordered function: from a model to a `ParallelModel`. Every parallel feature is one line here.

Order: cut into pipeline parts -> float8 layers -> fused loss -> tensor -> context -> recompute -> compile -> shard ->
materialise weights. The steps of later versions move in where they stand in this list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from trainwright.errors import ModelError
from trainwright.fused.linear import widen_products
from trainwright.mesh import Mesh
from trainwright.models.build import is_ours
from trainwright.parallel.parallel_model import LossFunction, ParallelModel
from trainwright.parallel.recompute import apply_recompute
from trainwright.parallel.units import find_units
from trainwright.parallel.zero import ZeroFlags, ZeroSettings, shard
from trainwright.torch_private import settle_shards


@dataclass(frozen=True)
class ApplySettings:
    """What `apply` composes."""

    zero: ZeroSettings
    recompute: str = "none"
    compile: bool = False
    shard_units: Sequence[str | type[nn.Module]] | None = None


def apply(
    model: nn.Module,
    mesh: Mesh,
    settings: ApplySettings,
    loss: LossFunction,
    materialise: Callable[[nn.Module], None] | None,
) -> ParallelModel:
    """Composes the strategy on `model`, in place. Collective.

    `materialise` gives parameters that are still on the meta device memory and values once they are shards; None where
    the model came with its values (they have been made equal on all ranks before).
    """
    aliases = tied_names(model)
    units = find_units(model, settings.shard_units)
    if not units and (settings.recompute != "none" or settings.compile):
        raise ModelError(
            f"recompute={settings.recompute}, compile={settings.compile} on {type(model).__name__}, in which no unit was found",
            "recompute and compile work unit by unit: repeated blocks, or what shard_units names",
            "shard_units=['Block'], or recompute=none and compile=false",
        )
    if settings.zero.policy.compute.itemsize == 2 and mesh.device.type == "cpu" and not is_ours(model):
        widen_products(model)  # ours do it themselves
    if settings.recompute == "full":
        apply_recompute(units)
    if settings.compile:
        for _, module in units:
            module.compile()
    modules = shard(model, units, mesh, settings.zero)
    if materialise is not None:
        materialise(model)
    settle_shards(modules)
    return ParallelModel(model, mesh, ZeroFlags(modules, settings.zero.stage), loss, units, aliases)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Other name -> first name, for parameters that go by several."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases
