"""An exponential moving average of the weights, on local shards, for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.errors import CheckpointError
from trainwright.optim.groups import ShardedParameter, local_tensor


class WeightAverage:
    """average <- d average + (1 - d) weights after every step, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp lets a short run forget its initial values; it reaches 0.999 after 9,000 updates. The average has the
    master weights' dtype, on their device, 4 bytes an element of this rank's shard in fp32.
    """

    def __init__(self, parameters: Sequence[ShardedParameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = list(parameters)
        self._averages = [local_tensor(shard.parameter).clone() for shard in self._parameters]
        self._swapped = False

    def _weights(self) -> list[Tensor]:
        return [local_tensor(shard.parameter) for shard in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of the step that was just made."""
        assert not self._swapped, "the average is in the model's place"
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for average, weight in zip(self._averages, self._weights(), strict=True):
            averages, weights = by_kind.setdefault((weight.device, weight.dtype), ([], []))
            averages.append(average)
            weights.append(weight)
        for averages, weights in by_kind.values():
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(self._averages, self._weights(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """The average in the model's place inside the block; the weights come back bitwise, also after an error.

        Copies of the parameters that sharding keeps whole (ZeRO 1 and 2) are not touched: reshard on both sides.
        """
        assert not self._swapped, "the average is in the model's place already"
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._swapped = False

    def state(self) -> dict[str, Tensor | DTensor]:
        """The averages by parameter name, laid out like the parameters. `updates` is a number of its own."""
        pairs = zip(self._parameters, self._averages, strict=True)
        return {shard.name: shard.as_global(average) for shard, average in pairs}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor | DTensor], updates: int) -> None:
        """Copies what `state` gave back in. Raises CheckpointError for a parameter without an average."""
        for shard, average in zip(self._parameters, self._averages, strict=True):
            if shard.name not in tensors:
                raise CheckpointError(
                    f"no average of {shard.name} in the checkpoint",
                    "with `ema`, a checkpoint holds the average of every trained weight",
                    "leave `ema` out, or resume with the model that wrote the checkpoint",
                )
            average.copy_(local_tensor(tensors[shard.name]))
        self.updates = updates
