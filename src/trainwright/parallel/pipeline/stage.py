"""One part of the model as a stage of torch's pipeline: the forward of a micro-batch, and FSDP's flags around backwards.

torch's stage, given an FSDP module, holds whole gradients until the last micro-batch whatever the ZeRO stage. Ours gets
the module wrapped, so that torch leaves it alone, and sets the flags as the plain runner does: at ZeRO 2 and 3 gradients
are reduced every micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from trainwright.data.batch import Batch
from trainwright.ledger import here
from trainwright.models.build import is_ours
from trainwright.models.documents import document_inputs
from trainwright.parallel.parallel_model import LossSum, Part
from trainwright.parallel.pipeline.cut import PartOfModel, part_of
from trainwright.parallel.pipeline.order import Action
from trainwright.phases import BACKWARD, FORWARD, phase
from trainwright.torch_private import finish_backward

_GOLDEN = 0x9E3779B97F4A7C15
_OF_LOSS = torch.float32
"""As torch's stage is told beforehand and some versions check; gradients pass it unrounded, being 1 there."""


@dataclass
class StepUnderWay:
    """What the stages of a rank need beside activations."""

    micro_batches: Sequence[Any]
    scale: float | Tensor
    before: Callable[[int], AbstractContextManager[Any]]
    losses: dict[int, LossSum] = field(default_factory=dict)
    """By micro-batch; on the last part's rank."""
    actions: list[Action] = field(default_factory=list)
    """What this rank has computed, in order."""


class PartRunner(nn.Module):
    """A part's forward of one micro-batch, as the stage calls it."""

    def __init__(self, part: Part, loss: Callable[[nn.Module, Any], LossSum], device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.module = part.module
        self.flags = part.flags
        found = part_of(part.module)
        assert found is not None, "a pipeline runs parts of a cut model"
        self.of_model: PartOfModel = found
        self.step: StepUnderWay | None = None
        self._part, self._loss = part, loss

    def forward(self, *received: Tensor, index: Tensor) -> Tensor:
        """The residual stream [B, T, D], or from the last part `scale` x the sum of the token losses []."""
        step, number = self.step, int(index)
        assert step is not None, "the stage's schedule runs inside PipelineModel.run"
        step.actions.append(Action("F", self.of_model.index, number))
        here.micro_batch(number, len(step.micro_batches))
        with step.before(number), phase(FORWARD):
            self._own_randomness()
            hidden = _pass(received[0]) if received else None
            output = self.compute(hidden, step.micro_batches[number])
        if isinstance(output, Tensor):
            return _pass(output)
        step.losses[number] = LossSum(output.sum.detach(), output.count, output.masked)
        return (output.sum * step.scale).to(_OF_LOSS)

    def compute(self, hidden: Tensor | None, micro_batch: Any) -> Tensor | LossSum:
        """The part's output for one micro-batch: the residual stream, or the last part's sum of token losses."""
        self.of_model.hidden = hidden
        try:
            with self._part.sequence.slicing(micro_batch):
                inputs = self._part.sequence.split(micro_batch)
                if self.of_model.is_last:
                    return self._loss(self.module, inputs)
                result: Tensor = self.module(**model_inputs(self.module, inputs)).hidden
                return result
        finally:
            self.of_model.hidden = None

    def _own_randomness(self) -> None:
        """Other models' dropout draws from torch's generators, which every part finds seeded alike."""
        if self.of_model.index and not is_ours(self.module):
            torch.manual_seed((torch.initial_seed() + self.of_model.index * _GOLDEN) % (1 << 63))


class _Boundary(torch.autograd.Function):
    """Identity. What is sent, forward and back, is contiguous (nn.LSTM's is not) and no view (torch detaches it in place)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _pass(x: Tensor) -> Tensor:
    passed: Tensor = _Boundary.apply(x)
    return passed


def model_inputs(module: nn.Module, micro_batch: Any) -> dict[str, Any]:
    """What a part before the last is called with: all but the labels."""
    if isinstance(micro_batch, Batch):
        return {"input_ids": micro_batch.input_ids, **document_inputs(module, micro_batch)}
    return {key: value for key, value in micro_batch.items() if key != "labels"}


class Stage(PipelineStage):
    """A `PipelineStage` whose collectives are ours to time.

    whole_backward: where the schedule asks for the half of a backward that makes the inputs' gradients, the whole runs.
    """

    def __init__(self, runner: PartRunner, group: Any, boundary: Boundary, whole_backward: bool) -> None:
        of_model, device = runner.of_model, runner.device
        super().__init__(
            runner,
            of_model.index,
            of_model.count,
            device,
            input_args=() if of_model.is_first else (boundary.example(of_model.index),),
            output_args=torch.zeros((), dtype=_OF_LOSS, device=device)
            if of_model.is_last
            else (boundary.example(of_model.index + 1),),
            group=group,
            dw_builder=(lambda: _nothing_left) if whole_backward else None,
        )
        self._runner = runner
        self._whole = whole_backward

    def _get_init_p2p_neighbors_ops(self) -> Any:
        # Messages that open the connections. Gloo has none to the own rank, where zbv has two neighbouring parts (torch 2.11 asks).
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    # torch keeps a buffer for every micro-batch's input and gradient from the first step on; ours live while in use.

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        _renew(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        _renew(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _renew(self.args_recv_info[fwd_chunk_id], torch.device("meta"))
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        step = self._under_way()
        if self._whole and not full_backward:
            last_backward = bwd_chunk_id == len(step.micro_batches) - 1
        kind = "B" if full_backward or self._whole else "I"
        step.actions.append(Action(kind, self._runner.of_model.index, bwd_chunk_id))
        here.micro_batch(bwd_chunk_id, len(step.micro_batches))
        with phase(BACKWARD):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        _renew(self.grad_recv_info.get(bwd_chunk_id, ()), torch.device("meta"))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        if not self._whole:
            self._under_way().actions.append(Action("W", self._runner.of_model.index, bwd_chunk_id))
        return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def _under_way(self) -> StepUnderWay:
        assert self._runner.step is not None, "a backward inside a step"
        return self._runner.step

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        flags = self._runner.flags
        if backward_type == "full":
            flags.begin(last=last_backward)
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        flags.hold()  # also for the weights: torch walks the graph piece by piece, and a hook of FSDP's may run in between
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "weight":
            flags.begin(last=last_backward)
            finish_backward(self._runner.module)
        return result


def _renew(infos: Any, device: torch.device) -> None:
    """A new buffer for what is received, in the place of the one before; on the meta device none at all."""
    for info in infos:
        if isinstance(getattr(info, "buffer", None), Tensor):
            info.buffer = torch.empty_like(info.buffer, device=device, requires_grad=info.buffer.requires_grad)


def _nothing_left() -> None:
    """The second half of a backward that ran whole."""


@dataclass(frozen=True)
class Boundary:
    """What passes between the parts for one shape of micro-batch: by the part that receives it, (shape, dtype)."""

    received: dict[int, tuple[tuple[int, ...], torch.dtype]]

    def example(self, part: int) -> Tensor:
        """A tensor without memory, of the kind that `part` receives."""
        shape, dtype = self.received[part]
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
