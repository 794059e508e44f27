"""The model of a run: built anew for a number of steps, and what is known of it before it is cut up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from trainwright.config import Config, Resolved
from trainwright.engine import Engine
from trainwright.errors import ConfigError
from trainwright.fused.linear import widens
from trainwright.mesh import Degrees
from trainwright.model_source import model_for
from trainwright.monitor.flops import peak_flops
from trainwright.precision.policy import DTYPES
from trainwright.startup import UserParts, build_engine


@dataclass(frozen=True)
class ModelFacts:
    """Of the whole model, whatever part of it this rank holds."""

    parameters: int
    flops_per_token: float
    """Forward and backward."""


class RunModel:
    """Builds engines on the config's model.

    resumed: the weights come from a checkpoint; those of init_from may be gone by now.
    """

    def __init__(self, resolved: Resolved, vocab_size: int, accumulation: int, resumed: bool) -> None:
        if resumed:
            resolved = replace(resolved, config=resolved.config.model_copy(update={"init_from": None}))
        self._resolved = resolved
        self._vocab_size = vocab_size
        self._accumulation = accumulation
        self._facts: ModelFacts | None = None

    def build(self, steps: int | None) -> Engine:
        """An engine for a run of `steps`. Collective. Raises ConfigError for sequences longer than the model takes."""
        model_config = self._resolved.config.model
        assert model_config is not None, "check_trainable asks for a model"
        model, load = model_for(model_config, self._vocab_size)
        length = self._resolved.config.data.sequence_length
        _check_length(model, length)
        self._facts = _facts(model, length)
        return build_engine(model, self._resolved, UserParts(load_weights=load), steps, self._accumulation)

    @property
    def facts(self) -> ModelFacts:
        """Known once an engine was built."""
        assert self._facts is not None, "build() comes first"
        return self._facts


def _check_length(model: nn.Module, length: int) -> None:
    settings = getattr(model, "settings", getattr(model, "config", None))
    limit = getattr(settings, "max_sequence_length", getattr(settings, "max_position_embeddings", None))
    if limit is not None and length > limit:
        ours = hasattr(settings, "max_sequence_length")
        raise ConfigError(
            f"data.sequence_length={length} for a model of {limit} positions",
            "a sequence is no longer than the model's positions",
            f"data.sequence_length={limit}"
            + (f", or model.transformer.max_sequence_length={length} for a model trained from scratch" if ours else ""),
        )


def _facts(model: nn.Module, sequence_length: int) -> ModelFacts:
    parameters = sum(p.numel() for p in model.parameters())
    function = getattr(model, "flops_per_token", None)
    return ModelFacts(parameters, float(function(sequence_length)) if function is not None else 6.0 * parameters)


def peak_flops_of_all_ranks(config: Config, device: torch.device) -> float:
    """FLOP/s of matrix products over all ranks' devices. Collective: the ranks of one machine share it."""
    dtype = DTYPES[config.precision.dtype]
    if widens(torch.empty(0, dtype=dtype, device=device)):
        dtype = torch.float32  # the format that the products are made in on this processor
    own, _ = peak_flops(dtype, device)
    total = torch.tensor([own], dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total.item())


def describe_strategy(config: Config, degrees: Degrees) -> str:
    """One line: what the ranks share, such as "ZeRO-2 on 2 ranks x tensor 2 x pipeline 2 (1f1b)"."""
    ranks = degrees.replicate * degrees.shard
    text = f"ZeRO-{config.zero.stage} on {ranks} rank{'s' if ranks > 1 else ''}"
    if degrees.replicate > 1 and config.zero.stage:
        text += f" in {degrees.replicate} copies"
    for axis in ("context", "tensor", "pipeline"):
        degree = getattr(degrees, axis)
        if degree > 1:
            text += f" x {axis} {degree}"
    return text + (f" ({config.parallel.pipeline_schedule})" if degrees.pipeline > 1 else "")
