"""CPU offload of optimizer states: master weights, moments and the update itself in the host's memory.

Per step, gradients go to the host (4 bytes an element of this rank's shard), torch's fused CPU kernels update the
master copy there, and the new values come back (4 bytes more). The device keeps parameters and gradients alone:
8 bytes an element fewer with Adam. Copies run through pinned memory on CUDA.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.optim.groups import ShardedParameter, local_tensor
from trainwright.optim.handle import OptimizerHandle

_warned = False


def _host_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor)


@dataclass(frozen=True)
class HostParameter(ShardedParameter):
    """A parameter whose `local` is the master copy of its shard in host memory, with a gradient buffer beside it."""

    grad_buffer: Tensor

    @classmethod
    def on_host(cls, shard: ShardedParameter) -> HostParameter:
        """The offloaded form of `shard`."""
        values = local_tensor(shard.parameter)
        return cls(shard.name, shard.parameter, nn.Parameter(_host_copy(values)), _host_copy(values))

    def pull_grad(self) -> None:
        """Starts the gradient's copy to the host."""
        grad = self.parameter.grad
        if grad is None:
            self.local.grad = None
            return
        self.grad_buffer.copy_(local_tensor(grad), non_blocking=True)
        self.local.grad = self.grad_buffer

    def push(self) -> None:
        """Starts the master copy's way back into the model; later work on the device waits for it."""
        if self.local.grad is not None:
            local_tensor(self.parameter).copy_(self.local.detach(), non_blocking=True)

    def reload(self) -> None:
        """Takes the model's values as master copy."""
        self.local.detach().copy_(local_tensor(self.parameter))


class OffloadedHandle(OptimizerHandle):
    """An optimizer over `HostParameter`s."""

    @torch.no_grad()
    def step(self) -> None:
        """One update on the host, then back to the device."""
        self.forget_placeholders()
        for shard in self.parameters:
            shard.pull_grad()
        self._wait_for_device()
        self.optimizer.step()
        for shard in self.parameters:
            shard.push()

    def load_state(self, tensors: Mapping[str, Tensor | DTensor]) -> None:
        """As for any optimizer; and takes the model's weights, which a checkpoint loads first, as master copies."""
        super().load_state(tensors)
        self.reload_parameters()

    def weights_loaded(self) -> None:
        """Takes the model's weights, which have just changed, as master copies."""
        self.reload_parameters()

    def _wait_for_device(self) -> None:
        # Gradients must have arrived; and the last step's values must have left, before they are overwritten.
        for device in {local_tensor(s.parameter).device for s in self.parameters}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def reload_parameters(self) -> None:
        """Takes the model's present values as master copies: to be called after weights were loaded into it."""
        self._wait_for_device()
        for shard in self.parameters:
            assert isinstance(shard, HostParameter), "an offloaded handle holds host parameters"
            shard.reload()


def offload_shards(shards: list[ShardedParameter], force: bool = False) -> list[ShardedParameter]:
    """`shards` as `HostParameter`s; unchanged, with a warning once, where all are in host memory already.

    `force` copies even then (tests of the same code path without an accelerator).
    """
    global _warned
    if not force and all(local_tensor(s.parameter).device.type == "cpu" for s in shards):
        if not _warned:
            _warned = True
            warnings.warn(
                "offload.optimizer=cpu: the optimizer's states are already in host memory; nothing is moved",
                stacklevel=2,
            )
        return shards
    return [HostParameter.on_host(shard) for shard in shards]
