"""A step's forwards and backwards captured once as a CUDA graph, then replayed: the host launches one thing a step.

What a replay reads lies where it lay at the capture: the micro-batches are copied into tensors of its own, the loss scale
and the step's number are tensors, parameters change in place, and gradients come back in the same memory. The update is
outside, since its learning rate and its decision to skip are the host's.

Whole-network capture as in torch's notes on CUDA graphs; in the first article on them (MLPerf 1.0, NVIDIA 2021) it is what made
small models fast. One rank alone: FSDP2's gathers are driven by the host.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from trainwright.data.batch import Batch
from trainwright.errors import ModelError
from trainwright.parallel.parallel_model import LossSum
from trainwright.phases import GRAPH, phase

WARM_UP = 3
"""Steps of one kind that run as usual before the capture: what compiles, allocates or measures itself has done so by then.
The last is a rehearsal, with tensors in the numbers' places."""

Run = Callable[[Sequence[Any], float | Tensor, int | Tensor], LossSum]
"""(micro-batches, factor of the loss sums, number of the step) -> sums of the step, gradients in the parameters."""
Kind = tuple[str, tuple[Any, ...]]


class Recording(Protocol):
    """What holds a captured piece of work."""

    def rehearse(self, work: Callable[[], LossSum]) -> tuple[LossSum, str]:
        """Does `work` as it is; what there was in it that cannot be captured, or nothing."""

    def capture(self, work: Callable[[], LossSum]) -> LossSum:
        """Records `work` without doing it; its results are where replays leave theirs."""

    def replay(self) -> None:
        """Does it."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, with memory of its own."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def rehearse(self, work: Callable[[], LossSum]) -> tuple[LossSum, str]:
        """A host that waits for the GPU would break the capture, and torch with it: it is looked for before."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [w for w in said if "called a synchronizing" in str(w.message)]
        for other in said:
            if other not in waits and "debug mode" not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return found, f"the host waits for the GPU at {waits[0].filename}:{waits[0].lineno}" if waits else ""

    def capture(self, work: Callable[[], LossSum]) -> LossSum:
        """Raises RuntimeError where torch refuses, ModelError where CUDA does, after which the process is of no use."""
        stream = torch.cuda.current_stream()
        gc.collect()  # graphs of earlier steps that hang in cycles know other streams
        try:
            # Thread-local: a loader that pins memory, or a watchdog, does not break the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                return work()
        except RuntimeError as error:
            if torch.cuda.current_stream() != stream:  # torch leaves its stream and its pool only when CUDA ends well
                raise ModelError(
                    f"a step that CUDA cannot capture, with fused.cuda_graphs=true: {_cause(error)}",
                    "a captured step neither waits for the GPU nor copies from memory that is not pinned",
                    "fused.cuda_graphs=false, and start again from the last checkpoint",
                ) from error
            raise

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


@dataclass(frozen=True)
class _Inputs:
    """What changes from step to step, where a recording finds it."""

    micro_batches: list[Any]
    scale: Tensor
    step: Tensor

    @classmethod
    def of(cls, micro_batches: Sequence[Any], scale: float, step: int, device: torch.device) -> _Inputs:
        return cls(
            [_mapped(m, torch.clone) for m in micro_batches],
            torch.full((), scale, dtype=torch.float64, device=device),
            torch.full((), step, dtype=torch.int64, device=device),
        )

    def take(self, micro_batches: Sequence[Any], scale: float, step: int) -> None:
        for mine, given in zip(_tensors(self.micro_batches), _tensors(micro_batches), strict=True):
            mine.copy_(given, non_blocking=True)
        self.scale.fill_(scale)
        self.step.fill_(step)


@dataclass(frozen=True)
class _Captured:
    """A recording, and the tensors by which it is reached."""

    recording: Recording
    kind: Kind
    inputs: _Inputs
    total: LossSum
    gradients: list[tuple[nn.Parameter, Tensor]]

    def replay(self) -> LossSum:
        with phase(GRAPH):
            self.recording.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.total


class _TakenForGranted:
    """What a recording takes for granted of the model: which tensors its modules keep, and where; who trains.

    Tensors are held, so that no other can come to lie where one was.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        places = [place for m in self._modules for place in (m._parameters, m._buffers, vars(m))]
        self._tensors = [(p, key, value) for p in places for key, value in p.items() if isinstance(value, Tensor)]
        self._were = [(t.data_ptr(), t.requires_grad) for _, _, t in self._tensors]
        self._training = [m.training for m in self._modules]

    @property
    def same(self) -> bool:
        """Whether it still holds."""
        return (
            all(place.get(key) is tensor for place, key, tensor in self._tensors)
            and self._were == [(t.data_ptr(), t.requires_grad) for _, _, t in self._tensors]
            and self._training == [m.training for m in self._modules]
        )


class CapturedStep:
    """Runs steps: the first few of a kind as they are, then the capture of one, then replays of it.

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
        self.replays = 0
        """Steps that were replays."""
        self._warm: Counter[Kind] = Counter()
        self._granted: _TakenForGranted | None = None
        self._captured: _Captured | None = None
        self._given_up = False
        self._said_other = False

    def run(self, run: Run, micro_batches: Sequence[Any], scale: float, step: int) -> LossSum:
        """One step's forwards and backwards. `run` does them, with plain numbers or with tensors in their place.

        What is returned, and the gradients, are overwritten by the next step. Raises ModelError where a capture failed
        past repair.
        """
        if self._given_up:
            return run(micro_batches, scale, step)
        self._forget()  # a copy that is up to date would not be made anew inside the recording, nor used by it
        kind = _kind_of(micro_batches)
        if self._granted is None or not self._granted.same:
            self._captured, self._granted = None, _TakenForGranted(self._module)
            self._warm.clear()
        if self._captured is None and kind is not None:
            self._warm[kind] += 1
            if self._warm[kind] >= WARM_UP and (reason := self._refusal()):
                self._give_up(reason)
            elif self._warm[kind] == WARM_UP:
                return self._rehearse(run, _Inputs.of(micro_batches, scale, step, self._device))
            elif self._warm[kind] > WARM_UP:
                self._granted = _TakenForGranted(self._module)  # with what the warm-up has made
                self._captured = self._capture(run, kind, _Inputs.of(micro_batches, scale, step, self._device))
        if kind is None or (self._captured is not None and self._captured.kind != kind):
            self._say_other()
        if self._captured is None or self._captured.kind != kind:
            return run(micro_batches, scale, step)
        self.replays += 1
        self._captured.inputs.take(micro_batches, scale, step)
        return self._captured.replay()

    def close(self) -> None:
        """Frees what is captured; steps run as they are from here on."""
        self._captured, self._granted, self._given_up = None, None, True

    def _rehearse(self, run: Run, inputs: _Inputs) -> LossSum:
        found, reason = self._recording().rehearse(lambda: run(inputs.micro_batches, inputs.scale, inputs.step))
        if reason:
            self._give_up(reason)
        return found

    def _capture(self, run: Run, kind: Kind, inputs: _Inputs) -> _Captured | None:
        recording, parameters = self._recording(), list(self._module.parameters())
        try:
            total = recording.capture(lambda: run(inputs.micro_batches, inputs.scale, inputs.step))
        except RuntimeError as error:
            self._forget()
            for parameter in parameters:
                parameter.grad = None
            self._give_up(_cause(error))
            return None
        gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        return _Captured(recording, kind, inputs, total, gradients)

    def _give_up(self, reason: str) -> None:
        self.close()
        warnings.warn(
            f"fused.cuda_graphs: steps run without a graph ({reason[:300]}); fused.cuda_graphs=false leaves this out",
            stacklevel=2,
        )

    def _say_other(self) -> None:
        if not self._said_other:
            self._said_other = True
            warnings.warn(
                "fused.cuda_graphs: a step whose tensors have other shapes than the captured ones, or that comes with other "
                "values beside tensors, runs without a graph (said once); sequences of one length keep it",
                stacklevel=2,
            )


def _cause(error: BaseException) -> str:
    """The first line of what began it: ending a broken capture raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


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


def _kind_of(micro_batches: Sequence[Any]) -> Kind | None:
    """Equal for micro-batches that differ in their tensors' values alone; None for those that cannot be told apart."""
    leaves, names = [], []
    for micro_batch in micro_batches:
        if isinstance(micro_batch, Batch):
            names.append(f"Batch {micro_batch.document_ids is None} {micro_batch.position_ids is None}")
            leaves += _tensors([micro_batch])
        else:
            inside, spec = tree_flatten(micro_batch)
            names.append(repr(spec))
            leaves += inside
    if not all(leaf is None or isinstance(leaf, Tensor | str | int | float | bool) for leaf in leaves):
        return None
    kinds = ((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
    return " ".join(names), tuple(kinds)
