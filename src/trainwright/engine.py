"""The engine: forward / backward / step / train_batch / save / load over finished parts. It decides nothing.

What to shard, in which format, with which optimizer is settled before (`parallel/apply.py`, `startup.py`); here is the
order of events in a step, and what is said when the calls come in another order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trainwright import distributed
from trainwright.checkpoint.save import save
from trainwright.data.batch import Batch
from trainwright.errors import UsageError
from trainwright.evaluate import Evaluation, evaluate
from trainwright.generate import GenerationSettings, continue_prompts
from trainwright.guard.numerics import Replay
from trainwright.guard.replicas import check_replicas
from trainwright.ledger import collective_call, here
from trainwright.normaliser import ForwardRecord, StepNormaliser, StepSums, unmask_one_if_empty
from trainwright.optim.schedules import LrDriver
from trainwright.parts import Parts
from trainwright.phases import BACKWARD, UPDATE, phase
from trainwright.snapshot import content_of, restore
from trainwright.update import StepResult
from trainwright.whole_step import whole_step


class Engine:
    """Trains one model. Several engines can live in one process."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._model = parts.model
        self._normaliser = StepNormaliser(parts.accumulation, self._begin_backward, parts.mesh.device)
        self._normaliser.loss_scale = parts.update.scaler.scale
        self._loss_sums: list[Tensor] = []
        self._passes_at_last_step_call = 0
        self._forwards = 0
        self._last_forward: tuple[Any, Any] | None = None
        self._closed = False
        self._zero_grad_said = False
        self.global_step = 0
        """Optimizer steps done, skipped ones included."""
        self.tokens_seen = 0
        """Valid tokens of all steps so far."""
        self.last_step: StepResult | None = None

    # --- the three calls -------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @collective_call("forward")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. With gradients enabled, what comes back leads into the engine's backward.

        `labels` (a keyword, [B, T] or [B]; -100 ignored) tell how many tokens the loss is the mean of. Floating
        outputs in half precision come back as fp32.
        """
        self._check_open()
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), (args, kwargs))
        if not torch.is_grad_enabled():
            return self._model.forward(*args, **kwargs)
        self.parts.update.check()
        labels = kwargs.get("labels")
        record = ForwardRecord(None)
        if isinstance(labels, Tensor):
            record.valid = self.parts.count_tokens(labels)
            self._normaliser.agree_on_nominal(labels.numel())
            kwargs["labels"] = unmask_one_if_empty(labels, record.valid)
        self._last_forward = (args, kwargs)
        forward, self._forwards = self._forwards, self._forwards + 1
        with self.parts.randomness(self.global_step, forward, None):
            output = self._model.forward(*args, **kwargs)
        return self._normaliser.behind_gate(output, record)

    @collective_call("backward")
    def backward(self, loss: Tensor, tokens: int | Tensor | None = None) -> None:
        """`loss.backward()`, and: the number of tokens `loss` is the mean of may be given, several forwards may be joined.

        Raises UsageError where `loss` does not come from this engine's forward.
        """
        self._check_open()
        self._loss_sums.append(self._normaliser.prepare(loss, tokens))
        loss.backward()

    def _begin_backward(self, index: int, valid: Tensor | None) -> None:
        here.micro_batch(index, self.parts.accumulation)
        here.set_phase(BACKWARD)
        self._model.begin_micro_batch(index, self.parts.accumulation)
        weight = torch.ones((), device=self.device) if valid is None else valid
        nominal = 1.0 if valid is None else self._normaliser.nominal or 1.0
        self.parts.update.begin(weight, nominal * self.parts.accumulation, of_slice=False)

    @collective_call("step")
    def step(self) -> StepResult | None:
        """At the accumulation boundary: one optimizer step, on all ranks or on none. Before it: only counts.

        Raises UsageError without a backward since the last call; NumericsError after too many skipped steps in a row.
        """
        self._check_open()
        passes = self._normaliser.passes
        if passes == self._passes_at_last_step_call:
            raise UsageError(
                "step() without a backward before it",
                "forward, backward, step: each micro-batch has its backward first",
                "engine.backward(loss) or loss.backward(), then engine.step()",
            )
        self._passes_at_last_step_call = passes
        if passes < self.parts.accumulation:
            return None
        # A plain loss.backward() tells nobody its loss: the mean of the others would not be the step's.
        known = len(self._loss_sums) == passes
        sums = self._normaliser.sums(torch.stack(self._loss_sums).sum() if known else None)
        replay = None
        if self._last_forward is not None:
            args, kwargs = self._last_forward
            of = "in the last micro-batch" if passes > 1 else ""
            replay = Replay(self.module, lambda: self._model.forward(*args, **kwargs), of=of)
        return self._step(sums, replay)

    @property
    def is_boundary(self) -> bool:
        """Whether the next `step()` updates the weights."""
        return self._normaliser.passes == self.parts.accumulation

    # --- the whole step --------------------------------------------------------------------------------------------

    @collective_call("train_batch")
    def train_batch(self, batch: Batch | dict[str, Any]) -> float:
        """Forward, backward and step on this replica's share of the global batch; returns the global mean loss.

        `batch`: a `Batch`, or a dict of tensors whose first dimension is cut into the micro-batches.
        """
        self._check_open()
        if self._normaliser.passes:
            raise UsageError(
                "train_batch() inside an accumulation",
                "a step is made by one way",
                "finish it with backward() and step()",
            )
        self.parts.update.check()
        sums, replay = whole_step(self.parts, self._normaliser, batch, self.global_step)
        result = self._step(sums, replay)
        assert result.loss is not None
        return result.loss

    def _step(self, sums: StepSums, replay: Replay | None) -> StepResult:
        self._model.finish_gradients()
        self._model.end_step()
        try:
            with phase(UPDATE):
                result = self.parts.update.run(self.global_step, sums, replay)
        finally:
            self._normaliser.finish(self.parts.update.scaler.scale)
            self._passes_at_last_step_call = self._forwards = 0
            self._loss_sums, self._last_forward = [], None
        self.global_step = result.step
        self.tokens_seen += result.tokens
        self.last_step = result
        every = self.parts.config.config.guard.replicas_every
        if every and result.step % every == 0:
            check_replicas(self.parts.update.parameters, self.parts.mesh, result.step)
        here.step_done(result.step)
        return result

    # --- evaluation, generation, checkpoints -----------------------------------------------------------------------

    @collective_call("evaluate")
    def evaluate(self, batches: Iterable[Batch | dict[str, Any]]) -> Evaluation:
        """Mean loss over the valid tokens of `batches` (each rank its own share, equally many). Collective."""
        self._check_open()
        result = evaluate(self._model, batches, self.parts.mesh)
        self._after_inference()
        return result

    @collective_call("generate")
    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings | None = None) -> list[list[int]]:
        """Continues each prompt of token ids. Collective: every rank calls it with the same prompts."""
        self._check_open()
        result = continue_prompts(self._model.for_generation(), prompts, settings, self.device, distributed.from_main)
        self._after_inference()
        return result

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The exponential moving average in the weights' place inside the block, where `ema` is set. Between steps."""
        ema = self.parts.update.ema
        self._between_steps("averaged_weights")
        with ema.swap() if ema is not None else nullcontext():
            self._model.end_step()
            yield
            self._model.end_step()

    def _after_inference(self) -> None:
        if not self._normaliser.passes and not self._forwards:  # else a backward is to come
            self._model.end_step()

    @collective_call("save")
    def save(self, path: str | Path, state: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint folder: weights, optimizer, schedule, scaler, and the caller's JSON `state`. Collective."""
        self._between_steps("save")
        save(path, content_of(self, state or {}))

    @collective_call("load")
    def load(self, path: str | Path) -> dict[str, Any]:
        """Takes a checkpoint of any world size and strategy; returns the caller's `state`. Collective."""
        self._between_steps("load")
        return restore(self, path)

    @collective_call("full_state_dict")
    def full_state_dict(self) -> dict[str, Tensor]:
        """Whole weights on the CPU, on rank 0 only (empty elsewhere); tied names included. Collective."""
        self._between_steps("full_state_dict")
        return self._model.full_state()

    # --- small things ----------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The model, sharded."""
        return self._model.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; its parameters are this rank's shards."""
        return self.parts.update.optimizer.optimizer

    @property
    def lr_schedule(self) -> LrDriver:
        """What sets the learning rate of each step."""
        return self.parts.update.lr

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.parts.update.optimizer.lr

    @property
    def nominal_tokens(self) -> float | None:
        """Tokens of a full micro-batch, as agreed on by the ranks; None before the first forward."""
        return self._normaliser.nominal

    def resume_at(self, step: int, tokens: int, nominal_tokens: float | None) -> None:
        """Takes a checkpoint's counters."""
        self.global_step, self.tokens_seen = step, tokens
        self._normaliser.nominal = nominal_tokens
        self._normaliser.finish(self.parts.update.scaler.scale)
        self.parts.update.lr.before_step(step)

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping."""
        return None if self.last_step is None else self.last_step.grad_norm

    @property
    def loss_scale(self) -> float:
        """Loss scale of the next step; 1 but for fp16."""
        return self.parts.update.scaler.scale

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for a non-finite gradient so far."""
        return self.parts.update.skipped

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.parts.mesh.device

    def train(self, mode: bool = True) -> Engine:
        """As nn.Module.train."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """As nn.Module.eval."""
        return self.train(False)

    def zero_grad(self) -> None:
        """The engine clears gradients at each step itself; inside an accumulation this does nothing, and says so once."""
        if self._normaliser.passes and not self._zero_grad_said:
            self._zero_grad_said = True
            warnings.warn("zero_grad() inside an accumulation does nothing: step() clears the gradients", stacklevel=2)

    def close(self) -> None:
        """Lets go of the model; later calls raise UsageError. The process group stays for other engines."""
        if not self._closed:
            self._closed = True
            self.parts.update.optimizer.zero_grad()
            self._last_forward = None
            if self.parts.captured is not None:
                self.parts.captured.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("a call after close()", "a closed engine trains no more", "initialize another engine")

    def _between_steps(self, call: str) -> None:
        self._check_open()
        self.parts.update.check()
        if self._normaliser.passes:
            raise UsageError(
                f"{call}() inside an accumulation, after {self._normaliser.passes} of {self.parts.accumulation} micro-batches",
                "gradients are not saved: a checkpoint stands between two steps",
                f"call engine.step() at the boundary, then {call}()",
            )
