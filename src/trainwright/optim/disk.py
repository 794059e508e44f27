"""Optimizer states in files: Adam's moments, and the fp32 masters too, streamed through memory a block at a time.

ZeRO-Infinity's idea (arXiv 2104.07857) by way of the operating system: each parameter has a file of its own, mapped into
memory. A step walks through its blocks, asks for the next one ahead (the kernel reads it while this one is computed) and
lets go of the last (the kernel writes it in its own time). Beside the model a few blocks are in memory.

The files have no name: they belong to this process and vanish with it, whatever ends it, so that nobody can remove or
cut one. Their space is taken from the disk at the start, so that it cannot fill up in between. What a resume needs is in
checkpoints, in the layout of torch's AdamW, which any other setting can load.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from trainwright.errors import ConfigError
from trainwright.optim.groups import ShardedParameter, local_tensor
from trainwright.optim.handle import OptimizerHandle

_BLOCK = 1 << 20
"""Elements of a block: 4 MB each of the master, the gradient and the two moments."""
_FLOAT = 4
_PROBE_BYTES = 32 << 20
_M_MMAP_THRESHOLD = -3
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class DiskSettings:
    """Where states go, and whether fp32 masters go with them."""

    folder: Path
    masters: bool = False


class StateFile:
    """fp32 rows of `numel` elements in a file without a name, as tensors that share its pages."""

    def __init__(self, folder: Path, numel: int, rows: int) -> None:
        """Takes the file's whole space from the disk, as zeros. Raises ConfigError where the disk has not enough."""
        self.folder = folder
        pages = -(-numel * _FLOAT // mmap.PAGESIZE)
        self._row_bytes = pages * mmap.PAGESIZE
        size = max(rows * self._row_bytes, mmap.PAGESIZE)
        with tempfile.TemporaryFile(dir=folder) as file:
            _take_space(file.fileno(), size, folder)
            self._map = mmap.mmap(file.fileno(), size)
        self.rows = [
            torch.frombuffer(self._map, dtype=torch.float32, count=numel, offset=row * self._row_bytes)
            if numel
            else torch.empty(0)
            for row in range(rows)
        ]

    def ahead(self, start: int, stop: int) -> None:
        """Asks for elements start..stop of every row."""
        self._advise("MADV_WILLNEED", start, stop)

    def let_go(self, start: int, stop: int) -> None:
        """Elements start..stop of every row need not stay in memory; what was written is kept."""
        self._advise("MADV_DONTNEED", start, stop)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        option = getattr(mmap, advice, None)  # absent outside Unix: the kernel finds out for itself
        first, last = start * _FLOAT // mmap.PAGESIZE, -(-stop * _FLOAT // mmap.PAGESIZE)
        last = min(last, self._row_bytes // mmap.PAGESIZE)
        if option is None or last <= first or not self.rows[0].numel():
            return
        for row in range(len(self.rows)):
            self._map.madvise(option, row * self._row_bytes + first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _take_space(descriptor: int, size: int, folder: Path) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        free = os.statvfs(folder)
        raise ConfigError(
            f"offload.path={folder}: {size / 1e6:,.1f} MB more for optimizer states, {free.f_bavail * free.f_frsize / 1e6:,.1f} MB "
            f"are free ({error.strerror})",
            "the whole space is taken before training starts, so that a full disk cannot end it",
            "another offload.path, or more ranks, of which each keeps a share",
        ) from None


@dataclass(frozen=True)
class DiskParameter(ShardedParameter):
    """A parameter whose moments, and with `masters` whose fp32 master too (then `local`), are in `file`."""

    file: StateFile
    masters: bool

    @classmethod
    def on_disk(cls, shard: ShardedParameter, folder: Path, masters: bool) -> DiskParameter:
        """`shard` with a file; a master starts as the model's value."""
        values = local_tensor(shard.parameter)
        file = StateFile(folder, values.numel(), 3 if masters else 2)
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


def give_back_memory() -> None:
    """Has the C library return large blocks to the system as they are freed.

    glibc keeps blocks of up to 32 MB for later; gathered parameters and gradients of a few MB, freed between others that
    stay, then take twice their size. Other libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 512 << 10)


def offload_folder(path: str | None, run_dir: str | None) -> Path:
    """The folder for the files; raises ConfigError where it cannot be written to."""
    folder = Path(path or (Path(run_dir) / "offload" if run_dir else tempfile.gettempdir()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"offload.path={folder}: {error.strerror}",
            "a folder that this user can write to, on a local disk",
            "offload.path=/local_nvme/offload",
        ) from None
    return folder


def disk_speed(folder: Path) -> tuple[float, float]:
    """(reading, writing) in bytes/s: 32 MB, written through to the disk and read again without the page cache."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(_PROBE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())
        wrote = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(1 << 20):
            pass
        done = time.perf_counter()
    return _PROBE_BYTES / max(done - wrote, 1e-6), _PROBE_BYTES / max(wrote - began, 1e-6)


def lies_in_memory(folder: Path) -> bool:
    """Whether `folder` is on a file system in memory, where nothing is gained; False where that cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    place = str(folder.resolve())
    points = [(m[1], m[2]) for m in mounts if place == m[1] or place.startswith(m[1].rstrip("/") + "/")]
    return bool(points) and max(points, key=lambda point: len(point[0]))[1] in _IN_MEMORY
