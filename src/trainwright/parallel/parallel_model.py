"""What `apply` returns: the parts of the model that this rank holds, and how a micro-batch goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.ledger import here
from trainwright.mesh import Mesh
from trainwright.models.lazy_logits import lazy_logits
from trainwright.parallel.context.sequence_split import SequenceSplit
from trainwright.parallel.zero import ZeroFlags
from trainwright.phases import BACKWARD, FORWARD, phase


@dataclass(frozen=True)
class LossSum:
    """Sum of the token losses, number of valid tokens, and how many micro-batches had none (0-dim, on the device).

    What a runner returns is that of the whole replica, the same on all ranks that share its micro-batches.
    """

    sum: Tensor
    count: Tensor
    masked: Tensor

    @classmethod
    def of(cls, loss_sum: Tensor, count: Tensor) -> LossSum:
        """One micro-batch's."""
        return cls(loss_sum, count, (count == 0).to(count.dtype))

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.sum + other.sum, self.count + other.count, self.masked + other.masked)


@dataclass(frozen=True)
class Part:
    """A piece of the model that this rank holds, strategies applied: the whole of it without pipeline parallelism."""

    module: nn.Module
    units: tuple[tuple[str, nn.Module], ...]
    flags: ZeroFlags
    sequence: SequenceSplit = field(default_factory=SequenceSplit)


LossFunction = Callable[[nn.Module, Any], LossSum]
"""(module, micro-batch) -> the sum (carrying gradient) and the count of its token losses."""


class ParallelModel:
    """The plain runner: forward and backward of one micro-batch after another on this rank's module."""

    def __init__(
        self,
        part: Part,
        mesh: Mesh,
        loss: LossFunction,
        aliases: dict[str, str],
        compiled: bool = False,
    ) -> None:
        self.module = part.module
        self._compiled = compiled
        self.mesh = mesh
        self.units = part.units
        self.aliases = aliases
        """Tied weights: other name -> the name under which the parameter is stored."""
        self._flags = part.flags
        self._sequence = part.sequence
        self._loss = loss

    @property
    def plain(self) -> bool:
        """Whether one rank holds all of it, as it is."""
        return self._flags.plain

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter), tied ones once."""
        return list(self.module.named_parameters())

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the backward of micro-batch `index` of `count`: which collectives it ends with."""
        self._flags.begin_micro_batch(index, count)

    def finish_gradients(self) -> None:
        """After the last backward of a step: sums gradients of a tied weight that lies in several parts. Collective."""

    def second_copies(self) -> frozenset[str]:
        """Names among this rank's parameters that another rank's stand for: a tied weight's second copy."""
        return frozenset()

    def held_elsewhere(self) -> frozenset[str]:
        """Names of parameters and buffers that only other ranks hold: other layers, in a pipeline."""
        return frozenset()

    def describe(self) -> str:
        """What there is to say at the start of how the model is run, or nothing."""
        return f"{len(self.units)} blocks compiled: the first step takes longer" if self._compiled else ""

    def for_generation(self) -> nn.Module:
        """The module, to be run token by token. Raises UsageError where no rank can."""
        return self.module

    def end_step(self) -> None:
        """Before the optimizer (or a load) changes the masters: no whole copy of the old values survives."""
        self._flags.reshard()

    def split(self, micro_batch: Any) -> Any:
        """This rank's slice of the sequence dimension; the whole of it without context parallelism."""
        return self._sequence.split(micro_batch)

    def slicing(self, micro_batch: Any) -> AbstractContextManager[None]:
        """Around every forward on `split(micro_batch)`: where the slice stands in the whole."""
        return self._sequence.slicing(micro_batch)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, each context rank on its slice (`SequenceSplit.forward`)."""
        with lazy_logits(torch.is_grad_enabled() and kwargs.get("labels") is not None):
            return self._sequence.forward(self.module, args, kwargs)

    def loss(self, micro_batch: Any) -> LossSum:
        """Forward only."""
        return self._of_replica([self._slice_loss(micro_batch)])

    def _slice_loss(self, micro_batch: Any) -> LossSum:
        """Of this rank's tokens."""
        with self.slicing(micro_batch):
            return self._loss(self.module, self.split(micro_batch))

    def _of_replica(self, parts: Sequence[LossSum]) -> LossSum:
        """From this rank's tokens of each micro-batch to all of the replica's. Collective, one all-reduce."""
        sums = torch.stack([p.sum.detach().to(torch.float64) for p in parts]).sum()
        totals = torch.stack([sums, *(p.count.to(torch.float64) for p in parts)])
        counts = self.mesh.sum_over_replica(totals)[1:]
        return LossSum(totals[0], counts.sum(), (counts == 0).sum())

    def run(
        self,
        micro_batches: Sequence[Any],
        scale: float | Tensor,
        before: Callable[[int], Any],
        ahead: Callable[[Tensor], None],
    ) -> LossSum:
        """Forward and backward of all micro-batches; gradients are those of `scale` x Σ token losses.

        `before(i)` is called ahead of the forward of micro-batch i (dropout keys), `ahead` between a forward and its
        backward with the valid tokens of this rank's slice.
        """
        parts: list[LossSum] = []
        for index, micro_batch in enumerate(micro_batches):
            here.micro_batch(index, len(micro_batches))
            with before(index), phase(FORWARD):
                part = self._slice_loss(micro_batch)
            self.begin_micro_batch(index, len(micro_batches))
            ahead(part.count)
            with phase(BACKWARD):
                (part.sum * scale).backward()
            parts.append(replace(part, sum=part.sum.detach()))
        return self._of_replica(parts)

    def state(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of all that a checkpoint keeps of the model: parameters (shards) and persistent buffers."""
        return [
            (name, t.detach()) for name, t in self.module.state_dict(keep_vars=True).items() if name not in self.aliases
        ]

    def full_state(self) -> dict[str, Tensor]:
        """Whole weights on the CPU, on rank 0 only (empty elsewhere); tied names included. Collective."""
        full: dict[str, Tensor] = {}
        main = dist.get_rank() == 0
        for name, tensor in self.state():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if main:
                full[name] = whole.detach().cpu().clone()
        if main:
            full.update({alias: full[name] for alias, name in self.aliases.items()})
        return full

    def aliases_for_checkpoint(self) -> dict[str, str]:
        """`aliases` under the names that a checkpoint uses."""
        return {f"model.{alias}": f"model.{name}" for alias, name in self.aliases.items()}
