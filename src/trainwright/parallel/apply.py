"""THE ordered function: from a model to a `ParallelModel`. Every parallel feature is one line here.

Order: cut into pipeline parts -> others' layers on our passes -> float8 layers -> tensor -> fused loss -> context ->
recompute -> compile -> shard -> materialise weights. The steps of later versions move in where they stand in this list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainwright.config.schema import ParallelConfig, RecomputeConfig
from trainwright.errors import ModelError
from trainwright.fused import product_attention
from trainwright.fused.linear import widen_products, widens
from trainwright.fused.token_losses import PLAIN, LossTerms
from trainwright.mesh import Mesh
from trainwright.models.build import is_ours
from trainwright.models.fused_layers import fuse_layers
from trainwright.models.head import head_of
from trainwright.models.huggingface_attention import fuse_attention
from trainwright.models.lazy_logits import make_lazy
from trainwright.parallel.compile import apply_compile
from trainwright.parallel.context.apply import apply_context
from trainwright.parallel.float8 import apply_float8
from trainwright.parallel.notes import note_collectives, note_units
from trainwright.parallel.one_rank import OneRank, alone
from trainwright.parallel.overlap import Overlap, gather_ahead
from trainwright.parallel.parallel_model import LossFunction, ParallelModel, Part
from trainwright.parallel.pipeline.cut import cut
from trainwright.parallel.recompute import apply_recompute
from trainwright.parallel.tensor.apply import apply_tensor
from trainwright.parallel.units import find_units
from trainwright.parallel.zero import ZeroFlags, ZeroSettings, kept_fp32, shard
from trainwright.torch_private import settle_shards
from trainwright.torch_private.autograd import parts_backwards


@dataclass(frozen=True)
class ApplySettings:
    """What `apply` composes."""

    zero: ZeroSettings
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compile: bool = False
    float8: str = "none"
    loss: LossTerms = PLAIN
    shard_units: Sequence[str | type[nn.Module]] | None = None
    tensor_plan: Mapping[str, str] | None = None
    pipeline_plan: Sequence[str] | None = None


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
    _check_loss(model, settings.loss)
    if mesh.degrees.pipeline > 1:  # names are looked up in the whole model: a part may have none of them
        find_units(model, settings.shard_units)
        kept_fp32(model, settings.zero.keep_fp32)
    parts = []
    for module in cut(model, mesh, settings.parallel, settings.pipeline_plan):
        units = find_units(module, settings.shard_units)
        _check_units(units, module, settings)
        if settings.zero.policy.compute.itemsize == 2 and mesh.device.type == "cpu" and not is_ours(module):
            widen_products(module)  # ours do it themselves
            if product_attention.SERVES or widens(torch.empty(0, dtype=settings.zero.policy.compute)):
                fuse_attention(module)
        if not is_ours(module):
            fuse_layers(module)
        if settings.float8 != "none":
            apply_float8(units, settings.float8, mesh.device, settings.zero.keep_fp32)
        apply_tensor(module, mesh, settings.parallel, settings.tensor_plan)
        fuse_loss(module, settings.loss)
        sequence = apply_context(module, mesh, settings.parallel)
        apply_recompute(units, settings.recompute)
        if settings.compile:
            apply_compile(units, settings.zero.policy.compute, mesh.device)
        sharded: list[FSDPModule] = []
        overlap = Overlap(mesh, settings.zero.policy, settings.zero.offload_parameters != "none")
        if alone(module, mesh, settings.zero):
            flags: ZeroFlags = OneRank(module, units, settings.zero)
        else:
            sharded = shard(module, units, mesh, settings.zero)
            flags = ZeroFlags(sharded, settings.zero.stage, overlap)
            gather_ahead(module, [unit for _, unit in units], mesh)
        note_collectives(sharded, module, mesh, overlap, exact=kept_fp32(module, settings.zero.keep_fp32))
        note_units(units)
        if materialise is not None:
            materialise(module)
        settle_shards(sharded)
        overlap.watch(module)
        parts.append(Part(module, tuple(units), flags, sequence))
    if mesh.degrees.pipeline > 1:
        from trainwright.parallel.pipeline.model import PipelineModel  # torch's schedules import its compiler: a second

        again = settings.recompute.mode != "none" or settings.compile
        whole = "recomputation and compile" if again else "" if parts_backwards() else f"torch {torch.__version__}"
        return PipelineModel(parts, mesh, loss, aliases, settings.parallel, whole)
    return ParallelModel(parts[0], mesh, loss, aliases, settings.compile)


def fuse_loss(module: nn.Module, terms: LossTerms) -> None:
    """The loss made from hidden states and the head's weight, without whole logits: ours do so, others' are taught to.
    In place; `terms` are kept at the head."""
    head: Any = head_of(module)
    if head is not None:
        head.loss_terms = terms
        if not is_ours(module):
            make_lazy(head)


def _check_loss(model: nn.Module, terms: LossTerms) -> None:
    if terms != PLAIN and head_of(model) is None:
        raise ModelError(
            f"loss.label_smoothing={terms.label_smoothing}, loss.z_loss={terms.z_loss} with {type(model).__name__}",
            "they are added where the engine knows the projection to the vocabulary: our models, and Hugging Face's whose "
            "get_output_embeddings() is a linear layer without a bias",
            "leave `loss` out, and add them to the model's own loss",
        )


def _check_units(units: Sequence[tuple[str, nn.Module]], module: nn.Module, settings: ApplySettings) -> None:
    if not units and (settings.recompute.mode != "none" or settings.compile):
        raise ModelError(
            f"recompute={settings.recompute.mode}, compile={settings.compile} on {type(module).__name__}, in which no unit "
            "was found",
            "recompute and compile work unit by unit: repeated blocks, or what shard_units names",
            "shard_units=['Block'], or recompute=none and compile=false",
        )


def tied_names(model: nn.Module) -> dict[str, str]:
    """Other name -> first name, for parameters that go by several."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases
