"""What `apply` returns: the parts of the model that this rank holds, and how a micro-batch goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trainwright.mesh import Mesh
from trainwright.parallel.zero import ZeroFlags


@dataclass(frozen=True)
class LossSum:
    """Sum of the token losses, number of valid tokens, and how many micro-batches had none (0-dim, on the device)."""

    sum: Tensor
    count: Tensor
    masked: Tensor

    @classmethod
    def of(cls, loss_sum: Tensor, count: Tensor) -> LossSum:
        """One micro-batch's."""
        return cls(loss_sum, count, (count == 0).to(count.dtype))

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.sum + other.sum, self.count + other.count, self.masked + other.masked)


LossFunction = Callable[[nn.Module, Any], LossSum]
"""(module, micro-batch) -> the sum (carrying gradient) and the count of its token losses."""


class ParallelModel:
    """The plain runner: forward and backward of one micro-batch after another on this rank's module."""

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        flags: ZeroFlags,
        loss: LossFunction,
        units: Sequence[tuple[str, nn.Module]],
        aliases: dict[str, str],
    ) -> None:
        self.module = module
        self.mesh = mesh
        self.units = tuple(units)
        self.aliases = aliases
        """Tied weights: other name -> the name under which the parameter is stored."""
        self._flags = flags
        self._loss = loss

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter), tied ones once."""
        return list(self.module.named_parameters())

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the backward of micro-batch `index` of `count`: which collectives it ends with."""
        self._flags.begin_micro_batch(index, count)

    def end_step(self) -> None:
        """Before the optimizer (or a load) changes the masters: no whole copy of the old values survives."""
        self._flags.reshard()

    def split(self, batch: Any) -> Any:
        """This rank's slice of the sequence dimension; the whole of it without context parallelism."""
        return batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self.module(*args, **kwargs)

    def loss(self, micro_batch: Any) -> LossSum:
        """Forward only."""
        return self._loss(self.module, micro_batch)

    def run(self, micro_batches: Sequence[Any], scale: float, before: Callable[[int], Any]) -> LossSum:
        """Forward and backward of all micro-batches; gradients are those of `scale` x Σ token losses.

        `before(i)` is called ahead of the forward of micro-batch i (dropout keys).
        """
        total: LossSum | None = None
        for index, micro_batch in enumerate(micro_batches):
            with before(index):
                part = self._loss(self.module, micro_batch)
            self.begin_micro_batch(index, len(micro_batches))
            (part.sum * scale).backward()
            part = replace(part, sum=part.sum.detach())
            total = part if total is None else total + part
        assert total is not None, "a step has a micro-batch at least"
        return total

    def state(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of all that a checkpoint keeps of the model: parameters (shards) and persistent buffers."""
        return [
            (name, t.detach()) for name, t in self.module.state_dict(keep_vars=True).items() if name not in self.aliases
        ]

    def aliases_for_checkpoint(self) -> dict[str, str]:
        """`aliases` under the names that a checkpoint uses."""
        return {f"model.{alias}": f"model.{name}" for alias, name in self.aliases.items()}
