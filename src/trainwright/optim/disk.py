"""Optimizer states in files: Adam's moments, and the fp32 masters too, streamed through memory a block at a time.

ZeRO-Infinity's idea (arXiv 2104.07857) by way of the operating system: each parameter has a file of its own, mapped into
memory. A step walks through its blocks, asks for the next one ahead (the kernel reads it while this one is computed) and
lets go of the last (the kernel writes it in its own time). Beside the model a few blocks are in memory.

What a resume needs is in checkpoints, in the layout of torch's AdamW, which any other setting can load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from trainwright.mapped_file import MappedFile, disk_speed, lies_in_memory
from trainwright.optim.groups import ShardedParameter, local_tensor
from trainwright.optim.handle import OptimizerHandle

_BLOCK = 1 << 20
"""Elements of a block: 4 MB each of the master, the gradient and the two moments."""


@dataclass(frozen=True)
class DiskSettings:
    """Where states go, and whether fp32 masters go with them."""

    folder: Path
    masters: bool = False


@dataclass(frozen=True)
class DiskParameter(ShardedParameter):
    """A parameter whose moments, and with `masters` whose fp32 master too (then `local`), are in `file`."""

    file: MappedFile
    masters: bool

    @classmethod
    def on_disk(cls, shard: ShardedParameter, folder: Path, masters: bool) -> DiskParameter:
        """`shard` with a file; a master starts as the model's value."""
        values = local_tensor(shard.parameter)
        file = MappedFile(folder, values.numel(), 3 if masters else 2)
        local = shard.local
        if masters:
            master = file.rows[2].view(values.shape)
            master.copy_(values)
            file.let_go(0, master.numel())
            local = nn.Parameter(master)
        return cls(shard.name, shard.parameter, local, file, masters)

    def pull_grad(self) -> None:
        """Nothing for masters: `DiskAdamW` takes gradients a block at a time."""
        if not self.masters:
            super().pull_grad()

    def moments(self) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq, shaped like the shard."""
        return self.file.rows[0].view(self.local.shape), self.file.rows[1].view(self.local.shape)

    def gradient(self) -> Tensor | None:
        """This rank's part of the gradient, in its own format and on its own device."""
        grad = self.parameter.grad
        return None if grad is None else local_tensor(grad)

    @torch.no_grad()
    def show_model(self) -> None:
        """Rounds the masters into the model, after they were loaded."""
        if self.masters:
            target = local_tensor(self.parameter)
            for start in range(0, target.numel(), _BLOCK):
                rows = slice(start, start + _BLOCK)
                target.view(-1)[rows].copy_(self.local.detach().view(-1)[rows])
                self.file.let_go(start, start + _BLOCK)


class DiskAdamW(torch.optim.Optimizer):
    """torch's fused AdamW (or Adam) on the host, a block at a time over `DiskParameter`s; its state has torch's names."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._kernel = adamw if decoupled else adam
        self.saved_as = "torch.AdamW" if decoupled else "torch.Adam"
        """The class that checkpoints name: its states are interchangeable with these."""
        self._shards: dict[int, DiskParameter] = {}

    def keep_in(self, shards: Sequence[DiskParameter]) -> None:
        """Tells where each parameter's states are. Before the first step."""
        self._shards = {id(shard.local): shard for shard in shards}

    def init_state(self) -> None:
        """The state that the first step would create."""
        for group in self.param_groups:
            for local in group["params"]:
                self._state_of(local)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for local in group["params"]:
                shard = self._shards[id(local)]
                gradient = shard.gradient()
                if gradient is not None:
                    self._update(shard, gradient, group)
        return loss

    def _state_of(self, local: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[local]
        if not state:
            first, second = self._shards[id(local)].moments()
            first.zero_()  # an earlier state may have been given up
            second.zero_()
            self._shards[id(local)].file.let_go(0, first.numel())
            state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=first, exp_avg_sq=second)
        return state

    def _update(self, shard: DiskParameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(shard.local)
        master = shard.local.detach().view(-1)
        target = local_tensor(shard.parameter).view(-1) if shard.masters else None
        first, second, gradient = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), gradient.reshape(-1)
        beta1, beta2 = group["betas"]
        shard.file.ahead(0, _BLOCK)
        for start in range(0, master.numel(), _BLOCK):
            rows = slice(start, start + _BLOCK)
            shard.file.ahead(start + _BLOCK, start + 2 * _BLOCK)
            block = master[rows].cpu()  # itself on CPUs
            # The kernel counts the step up in each call: in a copy of the counter.
            self._kernel(
                [block], [gradient[rows].to("cpu", torch.float32)], [first[rows]], [second[rows]], [], [state["step"].clone()],
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=float(group["lr"]),
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            if block.data_ptr() != master[rows].data_ptr():
                master[rows].copy_(block)
            if target is not None:
                target[rows].copy_(block)
            shard.file.let_go(start, start + _BLOCK)
        state["step"] += 1


class DiskHandle(OptimizerHandle):
    """An optimizer over `DiskParameter`s."""

    def __init__(self, optimizer: DiskAdamW, shards: Sequence[DiskParameter]) -> None:
        super().__init__(optimizer, shards)
        optimizer.keep_in(shards)
        self._disk_shards = list(shards)

    def masters(self) -> dict[str, Tensor]:
        """The fp32 values of parameters of which the model holds narrow copies, laid out like these."""
        return {s.name: s.as_global(s.local.detach()) for s in self._disk_shards if s.masters}

    def weights_loaded(self) -> None:
        """After `masters` were loaded into."""
        for shard in self._disk_shards:
            shard.show_model()

    def describe(self) -> str:
        """What lies on the disk, and how long a step will take to stream it, from a short measurement."""
        held = sum(row.nbytes for shard in self._disk_shards for row in shard.file.rows)
        kind = "moments and masters" if any(s.masters for s in self._disk_shards) else "moments"
        folder = self._disk_shards[0].file.folder
        read, write = disk_speed(folder)
        seconds = held / read + held / write
        memory = " (A FILE SYSTEM IN MEMORY: nothing is gained)" if lies_in_memory(folder) else ""
        return (
            f"offload: {held / 1e6:,.0f} MB of {kind} a rank in {folder}{memory}; a step reads and writes all of it: "
            f"{seconds:.1f} s more a step at the {read / 1e9:.1f} / {write / 1e9:.1f} GB/s measured, less what the page cache holds"
        )
