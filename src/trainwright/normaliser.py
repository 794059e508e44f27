"""The loss of a step is Σ token losses / Σ valid tokens over the whole global batch, in every layout.

In the three-call form the user's loss is a mean over its own micro-batch. Gradients enter the module through an
identity whose backward multiplies (so plain `loss.backward()` is right too) by

    loss_scale · valid / nominal / n            n micro-batches a step, nominal = tokens of a full micro-batch

and the step multiplies once by n · nominal / (Σ valid · loss_scale), where Σ runs over micro-batches and ranks. A static
loss scale thus means what it means elsewhere, and no summed loss overflows fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trainwright.errors import UsageError
from trainwright.ledger import here
from trainwright.torch_private.autograd import after_backward

IGNORE_INDEX = -100


@dataclass(eq=False)
class ForwardRecord:
    """One training forward: what its backward has to know."""

    valid: Tensor | None
    """Valid tokens, 0-dim, on the device; None where no labels were seen (micro-batches then weigh equally)."""
    consumed: bool = False
    factor: Tensor | float | None = field(default=None)


@dataclass(frozen=True)
class StepSums:
    """This rank's sums over the micro-batches of a step."""

    weight: Tensor
    """Valid tokens; where they are not counted, micro-batches."""
    masked: Tensor
    loss: Tensor | None
    nominal: float
    """What the gradients were divided by on their way in: the micro-batches' nominal weight, the same on every rank."""
    counted: bool


class _GradientGate(torch.autograd.Function):
    """Identity on the module's outputs; the backward multiplies by the record's factor."""

    @staticmethod
    def forward(ctx: Any, normaliser: StepNormaliser, record: ForwardRecord, *tensors: Tensor) -> Any:
        ctx.normaliser = normaliser
        ctx.record = record
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        factor = ctx.normaliser.enter_backward(ctx.record)
        return (None, None, *(None if g is None else g * factor for g in gradients))


@dataclass
class StepNormaliser:
    """Counts the backward passes of a step and weighs them. `accumulation` is n above.

    `begin` is called with the index of the micro-batch and its valid tokens (None: not counted) when its backward starts.
    """

    accumulation: int
    begin: Callable[[int, Tensor | None], None]
    device: torch.device
    nominal: float | None = None
    loss_scale: float = 1.0
    passes: int = 0
    valid_tokens: list[Tensor] = field(default_factory=list)
    equal_weights: bool = False
    _pass_records: list[ForwardRecord] = field(default_factory=list)

    def prepare(self, loss: Tensor, tokens: int | Tensor | None) -> Tensor:
        """Before `loss.backward()`: takes the count that is given, joins several forwards under one factor.

        Returns the sum of token losses that `loss` stands for, 0-dim. Raises UsageError where `loss` is no loss of
        this engine's forwards.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UsageError(
                f"backward() of {type(loss).__name__}{tuple(getattr(loss, 'shape', ()))}",
                "a loss is one number, the mean over the micro-batch",
                "engine.backward(output.loss), or loss.mean()",
            )
        records = records_of(loss)
        if not records:
            raise UsageError(
                "backward() of a loss that does not come from engine(...)",
                "forward comes first, through the engine, with gradients enabled",
                "loss = engine(inputs, labels=labels).loss; engine.backward(loss)",
            )
        counts = [r.valid for r in records if r.valid is not None]
        if tokens is not None:
            self.agree_on_nominal(int(tokens))
            for record in records:
                record.valid = None
            records[0].valid = torch.as_tensor(tokens, device=loss.device)
            counts = [records[0].valid]
        elif len(counts) not in (0, len(records)):
            raise UsageError(
                "one loss over several forwards, some with labels and some without",
                "a loss has one number of valid tokens",
                "engine.backward(loss, tokens=n)",
            )
        total = torch.stack(counts).sum() if counts else None
        for record in records:
            record.factor = self._factor(total)
        return loss.detach().double() * (1 if total is None else total)

    def enter_backward(self, record: ForwardRecord) -> Tensor | float:
        """Called by the gate when a gradient arrives; returns the factor on it."""
        if record.consumed:
            raise UsageError(
                "a second backward through the same forward",
                "each forward is followed by one backward",
                "call engine(...) again, or add the losses and call backward once",
            )
        if not self._pass_records:
            if self.passes >= self.accumulation:
                raise UsageError(
                    f"backward pass {self.passes + 1} of a step of {self.accumulation} micro-batch(es)",
                    "engine.step() follows the last backward of a step",
                    f"call engine.step(), or set batch.accumulation={self.passes + 1}",
                )
            self.begin(self.passes, record.valid)
            # Runs when the whole backward pass is over: a pass may cross several gates, and counts once.
            after_backward(self._leave_backward)
        record.consumed = True
        self._pass_records.append(record)
        return self._factor(record.valid) if record.factor is None else record.factor

    def _factor(self, valid: Tensor | None) -> Tensor | float:
        if valid is None:
            self.equal_weights = True
            return self.loss_scale / self.accumulation
        if self.nominal is None:
            raise AssertionError("the nominal number of tokens is agreed on at the first forward")
        return valid.to(torch.float64) * (self.loss_scale / (self.nominal * self.accumulation))

    def _leave_backward(self) -> None:
        records, self._pass_records = self._pass_records, []
        self.passes += 1
        counts = [r.valid for r in records if r.valid is not None]
        self.valid_tokens.extend(counts)
        if len(records) > 1 and any(r.factor is None for r in records) and len(counts) > 1:
            raise UsageError(
                f"one loss.backward() over {len(records)} forwards",
                "a loss over several forwards needs one factor for all of them",
                "call engine.backward(loss)",
            )

    def sums(self, loss_sum: Tensor | None) -> StepSums:
        """This rank's sums over the step's micro-batches. Raises UsageError where only some were counted."""
        if self.equal_weights and self.valid_tokens:
            raise UsageError(
                "micro-batches with and without a count of valid tokens in one step",
                "all micro-batches of a step are weighed in one way",
                "pass labels= to every forward, or tokens= to every engine.backward",
            )
        counted = bool(self.valid_tokens)
        counts = torch.stack(self.valid_tokens or [torch.ones((), device=self.device)] * self.passes)
        nominal = (self.nominal or 1.0) if counted else 1.0
        return StepSums(counts.sum(), (counts == 0).sum(), loss_sum, nominal * self.passes, counted)

    def finish(self, loss_scale: float) -> None:
        """Forgets the step; `loss_scale` is that of the next one."""
        self.loss_scale = loss_scale
        self.passes = 0
        self.valid_tokens = []
        self.equal_weights = False

    def agree_on_nominal(self, count: int) -> float:
        """Tokens of a full micro-batch: any number, but one and the same on all ranks and in every step. Collective, once."""
        if self.nominal is None:
            largest = torch.tensor([float(count)], device=self.device)
            if torch.distributed.get_world_size() > 1:
                here.collective(b"agreement on a micro-batch's size")
                torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
            self.nominal = max(1.0, float(largest.item()))
        return self.nominal

    def behind_gate(self, output: Any, record: ForwardRecord) -> Any:
        """A forward's output (any nest of tensors) behind the gate, halves as fp32."""
        leaves, spec = tree_flatten(output)
        half = (torch.float16, torch.bfloat16)
        leaves = [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in leaves]
        gated = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if not gated:
            return output
        through = iter(_GradientGate.apply(self, record, *gated))
        return tree_unflatten([next(through) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves], spec)


def records_of(loss: Tensor) -> list[ForwardRecord]:
    """Records of the gates that `loss` depends on, found by walking the graph above the module."""
    found: list[ForwardRecord] = []
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        record = getattr(node, "record", None)
        if isinstance(record, ForwardRecord):
            if record not in found:
                found.append(record)
            continue  # below is the module itself
        stack.extend(child for child, _ in node.next_functions)
    return found


def unmask_one_if_empty(labels: Tensor, count: Tensor) -> Tensor:
    """Labels with one entry set where `count` is 0, so that a mean over them stays finite; its weight is 0.

    labels [B, T] -> [B, T]. No host sync. The last position counts in shifted and unshifted conventions alike.
    """
    last = torch.zeros_like(labels, dtype=torch.bool)
    last.view(-1)[-1:] = True
    return torch.where(last & (count == 0), torch.zeros_like(labels), labels)
