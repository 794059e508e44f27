"""A step's forwards and backwards captured once as a CUDA graph, then replayed: the host launches one thing a step.

What a replay reads lies where it lay at the capture: the micro-batches are copied into tensors of its own, the loss scale
and the step's number are tensors, parameters change in place, and gradients come back in the same memory. The update is
outside, since its learning rate and its decision to skip are the host's.

Whole-network capture as in torch's notes on CUDA graphs; in the first article on them (MLPerf 1.0, NVIDIA 2021) it is what made
small models fast. One rank alone: FSDP2's gathers are driven by the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from trainwright.data.batch import Batch
from trainwright.parallel.parallel_model import LossSum
from trainwright.phases import GRAPH, phase

WARM_UP = 3
"""Steps that run as usual before the capture: what compiles, allocates or measures itself has done so by then."""

Run = Callable[[Sequence[Any], float | Tensor, int | Tensor], LossSum]
"""(micro-batches, factor of the loss sums, number of the step) -> sums of the step, gradients in the parameters."""


class Recording(Protocol):
    """What holds a captured piece of work."""

    def capture(self, work: Callable[[], LossSum]) -> LossSum:
        """Records `work` without doing it; its results are where replays leave theirs."""

    def replay(self) -> None:
        """Does it."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, with memory of its own."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], LossSum]) -> LossSum:
        """Raises RuntimeError where the work waits for the device, or does what a graph cannot hold."""
        # Thread-local: a loader that pins memory, or a watchdog, does not break the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


@dataclass(frozen=True)
class _Captured:
    """A recording, and the tensors by which it is reached."""

    recording: Recording
    kind: tuple[Any, ...]
    places: tuple[Any, ...]
    micro_batches: list[Any]
    scale: Tensor
    step: Tensor
    total: LossSum
    gradients: list[tuple[nn.Parameter, Tensor]]

    def replay(self, micro_batches: Sequence[Any], scale: float, step: int) -> LossSum:
        for mine, given in zip(_tensors(self.micro_batches), _tensors(micro_batches), strict=True):
            mine.copy_(given, non_blocking=True)
        self.scale.fill_(scale)
        self.step.fill_(step)
        with phase(GRAPH):
            self.recording.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.total


class CapturedStep:
    """Runs steps: the first few as they are, then the capture of one, then replays of it.

    forget: lets go of all copies of the parameters. refusal: after the warm-up, why the model's steps cannot be captured,
    or nothing. Where they cannot, or the micro-batches have another shape than the captured ones, a step runs as it is,
    which is said once.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        forget: Callable[[], None],
        refusal: Callable[[], str] = str,
        recording: Callable[[], Recording] = CudaGraph,
    ) -> None:
        self._module, self._device = module, device
        self._forget, self._refusal, self._recording = forget, refusal, recording
        self._steps = 0
        self.replays = 0
        """Steps that were replays."""
        self._captured: _Captured | None = None
        self._given_up = False
        self._said_other = False

    def run(self, run: Run, micro_batches: Sequence[Any], scale: float, step: int) -> LossSum:
        """One step's forwards and backwards. `run` does them, with plain numbers or with tensors in their place.

        What is returned, and the gradients, are overwritten by the next step.
        """
        if self._given_up or self._steps < WARM_UP:
            self._steps += 1
            return run(micro_batches, scale, step)
        self._forget()  # a copy that is up to date would not be made anew inside the recording, nor used by it
        kind, places = _kind_of(micro_batches), self._places()
        if self._captured is not None and self._captured.places != places:
            self._captured = None  # frees its memory before there is a second one
        if self._captured is None:
            self._captured = self._capture(run, micro_batches, (kind, places))
        if self._captured is None:
            return run(micro_batches, scale, step)
        if self._captured.kind != kind:
            self._say_other(micro_batches)
            return run(micro_batches, scale, step)
        self.replays += 1
        return self._captured.replay(micro_batches, scale, step)

    def _capture(
        self, run: Run, micro_batches: Sequence[Any], known: tuple[tuple[Any, ...], tuple[Any, ...]]
    ) -> _Captured | None:
        reason = self._refusal()
        if reason:
            self._give_up(reason)
            return None
        mine = [_mapped(m, torch.clone) for m in micro_batches]
        scale = torch.ones((), dtype=torch.float64, device=self._device)
        step = torch.zeros((), dtype=torch.int64, device=self._device)
        recording = self._recording()
        parameters = list(self._module.parameters())
        try:
            total = recording.capture(lambda: run(mine, scale, step))
        except RuntimeError as error:
            self._forget()
            for parameter in parameters:
                parameter.grad = None
            self._give_up(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
            return None
        gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        return _Captured(recording, *known, mine, scale, step, total, gradients)

    def _places(self) -> tuple[Any, ...]:
        """What a replay takes for granted of the model."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return (self._module.training, *((t.data_ptr(), t.requires_grad) for t in tensors))

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        warnings.warn(
            f"fused.cuda_graphs: steps run without a graph ({reason[:300]}); fused.cuda_graphs=false leaves this out",
            stacklevel=2,
        )

    def _say_other(self, micro_batches: Sequence[Any]) -> None:
        if not self._said_other:
            self._said_other = True
            shapes = sorted({tuple(t.shape) for t in _tensors(micro_batches)})
            warnings.warn(
                f"fused.cuda_graphs: a step of other shapes than the captured one ({shapes}) runs without a graph (said "
                "once); data in sequences of one length keep it",
                stacklevel=2,
            )


def _mapped(micro_batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The micro-batch with `function` of each of its tensors."""
    if isinstance(micro_batch, Batch):
        return micro_batch.map(function)
    return tree_map_only(Tensor, function, micro_batch)


def _tensors(micro_batches: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for micro_batch in micro_batches:
        _mapped(micro_batch, note)
    return found


def _kind_of(micro_batches: Sequence[Any]) -> tuple[Any, ...]:
    """Equal for micro-batches that differ in their tensors' values alone."""
    others = [
        repr([leaf for leaf in tree_leaves(m) if not isinstance(leaf, Tensor)])
        for m in micro_batches
        if not isinstance(m, Batch)
    ]
    keys = [
        tuple(m) if isinstance(m, dict) else (m.document_ids is None, m.position_ids is None) for m in micro_batches
    ]
    return (len(micro_batches), keys, others, [(tuple(t.shape), t.dtype) for t in _tensors(micro_batches)])
