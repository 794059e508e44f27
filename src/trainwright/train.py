"""`trainwright train`: the loop over a token data set, with callbacks at named points.

One run is a folder: config.yaml (resolved, each value's source), metrics.jsonl, summary.json, report.html,
checkpoints/, logs/.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright import distributed, storage
from trainwright.callbacks import Callback
from trainwright.config import Resolved
from trainwright.config.data_schema import DataConfig
from trainwright.data.batch import BatchPlan
from trainwright.data.loader import TokenLoader, eval_batches
from trainwright.data.mix import open_dataset
from trainwright.data.shards import TokenDataset, TokenSplit
from trainwright.engine import Engine
from trainwright.errors import NumericsError
from trainwright.evaluate import Evaluation
from trainwright.guard.spikes import SpikeDetector
from trainwright.guard.stalls import StallDetector, decoded, encoded
from trainwright.launch.signals import StopSignal
from trainwright.monitor.console import Console
from trainwright.monitor.flops import mfu, peak_memory_bytes
from trainwright.monitor.metrics import EvaluationRecord, StepRecord
from trainwright.monitor.network import SentBytes
from trainwright.monitor.profile import StepProfiler
from trainwright.monitor.sinks import Sinks
from trainwright.parallel.compile import CompileWatch
from trainwright.phases import DATA, phase
from trainwright.run_checkpoints import RunCheckpoints
from trainwright.run_incidents import RunIncidents


@dataclass
class TrainingLoop:
    """Everything a run holds while it trains."""

    resolved: Resolved
    run_dir: Path
    engine: Engine
    loader: TokenLoader
    held_out: TokenSplit | None
    plan: BatchPlan
    steps: int | None
    """The horizon; None trains until `stop_after` or a signal."""
    console: Console
    sinks: Sinks | None
    """On rank 0 only."""
    checkpoints: RunCheckpoints
    parameters: int
    """Of the whole model."""
    flops_per_token: float
    peak_flops: float
    profiler: StepProfiler
    incidents: RunIncidents
    spikes: SpikeDetector
    callbacks: Sequence[Callback] = ()
    best_val_loss: float = math.inf
    last_evaluation: EvaluationRecord | None = None
    last_record: StepRecord | None = None
    training_time_s: float = 0.0
    """Of all launches: steps and evaluations between them, without start-up, the last evaluation and the final save."""
    _best_at_end: bool = field(default=False, init=False)
    _masked_said: bool = field(default=False, init=False)
    _profile_said: bool = field(default=False, init=False)
    _stalls: StallDetector = field(default_factory=StallDetector, init=False)
    _compilations: CompileWatch = field(default_factory=CompileWatch, init=False)
    _sent: SentBytes = field(default_factory=SentBytes, init=False)

    def run(self, stop: StopSignal) -> str:
        """Trains to the horizon or until a stop; returns "finished" or "stopped". Collective."""
        config = self.resolved.config
        for callback in self.callbacks:
            callback.on_start(self)
        self.console.start(self.steps, self.engine.global_step)
        start_s = time.perf_counter()
        earlier_s = self.training_time_s
        status = "finished"
        while self.steps is None or self.engine.global_step < self.steps:
            if config.stop_after is not None and time.perf_counter() - start_s > config.stop_after:
                stop.request("stop_after")
            if self._agree_on_stop(stop):
                status = "stopped"
                break
            self._step(config.evaluate.every, config.checkpoint.every)
            self.training_time_s = earlier_s + time.perf_counter() - start_s
        if told := self.profiler.finish():
            self.console.say(told, warning=True)
            self._say_profile()
        if status == "finished":
            for callback in self.callbacks:
                callback.on_last_step(self)
            self.training_time_s = max(self.training_time_s, earlier_s + time.perf_counter() - start_s)
        if status == "finished" and self.held_out is not None:
            self.evaluate(config.evaluate.final_batches, final=True)
        best = self._best_at_end and status == "finished"
        if status == "stopped" or config.checkpoint.at_end or best:
            self.save(best=best)
        self.checkpoints.wait()
        self.console.close()
        for callback in self.callbacks:
            callback.on_end(self, status)
        return status

    def _agree_on_stop(self, stop: StopSignal) -> bool:
        """Whether a rank was asked to stop; on the way, who waited longest for the last step's batch. Collective."""
        last = self.last_record
        waited = encoded(last.data_time_s if last is not None else 0.0, dist.get_rank())
        asked, longest = distributed.agree_max_of([float(stop.requested), waited], torch.device("cpu"))
        if last is not None and (told := self._stalls.push(*decoded(longest), last.step_time_s)):
            self.console.say(f"step {last.step}: {told}", warning=True)
        return bool(asked)

    def _step(self, evaluate_every: int, save_every: int) -> None:
        waiting_s = time.perf_counter()
        self._compilations.begin()
        with self.profiler.step():
            with phase(DATA):
                batch = next(self.loader)
            start_s = time.perf_counter()
            self.engine.train_batch(batch)
            end_s = time.perf_counter()
        record = self._record(end_s - start_s, start_s - waiting_s)
        self._say_profile()
        if told := self._compilations.end(record.step):
            self.console.say(told, warning=True)
        self.last_record = record
        if self.sinks is not None:
            self.sinks.step(record)
        self.console.update(record)
        self._look_for_trouble(record)
        for callback in self.callbacks:
            callback.on_step_end(self, record)
        best = False
        settings = self.resolved.config.evaluate
        # The last step has the final evaluation; but only evaluations on the same batches tell which is the best.
        due = evaluate_every and record.step % evaluate_every == 0 and (record.step != self.steps or settings.keep_best)
        if due and self.held_out is not None:
            best = self.evaluate(settings.batches).best
        keep = best and settings.keep_best
        if record.step == self.steps:
            self._best_at_end = keep  # saved when callbacks have done with the weights
        elif keep or (save_every and record.step % save_every == 0):
            self.save(best=keep)

    def _look_for_trouble(self, record: StepRecord) -> None:
        """Keeps what is needed to look at a spike of the loss or a gradient that is not finite. All ranks see the same."""
        result = self.engine.last_step
        assert result is not None, "a step is done"
        if result.finding is not None:
            told = self.incidents.write("non-finite", record, f"skipped; {result.finding.describe()}")
            self.console.say(told, warning=True)
        deviations = self.spikes.push(record.loss)
        if deviations is None:
            return
        what = f"the loss is {record.loss:.4g}, {deviations:.0f} deviations above the {self.spikes.median:.4g} of the steps before"
        told = self.incidents.write("spike", record, what)
        if self.resolved.config.guard.on_spike == "stop":
            raise NumericsError(
                told, f"guard.spike={self.spikes.factor:g} with guard.on_spike=stop", "a lower optimizer.lr"
            )
        self.console.say(told, warning=True)

    def _say_profile(self) -> None:
        """Tables of where the traced steps' time went, and where memory was at its peak, once they are there."""
        found = self.profiler.result
        if found is None or self._profile_said:
            return
        self._profile_said = True
        rows = [(name, f"{ms:,.1f}", f"{ms / found.step_ms:.1%}") for name, ms in found.parts]
        rows.append(("a step", f"{found.step_ms:,.1f}", ""))
        if found.hidden_communication_ms:
            rows.append(("communication hidden behind compute", f"{found.hidden_communication_ms:,.1f}", ""))
        say = self.console.table
        say(f"Time, mean of {found.steps} traced steps (rank 0)", ("what", "ms a step", "share"), rows)
        operators = [(name[:60], f"{ms:,.1f}", calls) for name, ms, calls in found.operators]
        say("Dearest operators", ("operator", "ms a step", "calls"), operators)
        places = [(where, f"{held / 1e6:,.0f}") for where, held in self.profiler.places]
        say("Memory, largest first", ("where", "MB"), places)

    def _record(self, step_time_s: float, data_time_s: float) -> StepRecord:
        result = self.engine.last_step
        assert result is not None
        if result.masked_micro_batches and not self._masked_said:
            self._masked_said = True
            self.console.say(
                f"step {result.step}: {result.masked_micro_batches} micro-batch(es) without a token that counts; they "
                "contribute zero (metrics.jsonl counts them as masked_micro_batches)",
                warning=True,
            )
        tokens_per_s = self.plan.global_size * self.loader.sequence_length / step_time_s
        return StepRecord(
            step=result.step,
            tokens=self.engine.tokens_seen,
            samples=self.loader.position,
            loss=result.loss if result.loss is not None else math.nan,
            lr=result.lr,
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            skipped=self.engine.skipped_steps,
            step_time_s=step_time_s,
            data_time_s=data_time_s,
            tokens_per_s=tokens_per_s,
            mfu=mfu(self.flops_per_token, tokens_per_s, self.peak_flops),
            peak_memory_bytes=peak_memory_bytes(self.engine.device),
            masked_micro_batches=result.masked_micro_batches,
            node_sent_bytes=self._sent.step(),
        )

    def evaluate(self, max_batches: int, final: bool = False) -> EvaluationRecord:
        """Loss on the held-out split (at most `max_batches` global batches, 0: all of it), with the averaged weights
        where `ema` is set. Collective."""
        assert self.held_out is not None
        start_s = time.perf_counter()
        mesh = self.engine.parts.mesh
        batches = eval_batches(
            self.held_out,
            self.loader.sequence_length,
            self.plan,
            replica=mesh.data_parallel_rank,
            replicas=mesh.data_parallel_size,
            max_batches=max_batches,
            document_mask=self.resolved.config.data.document_mask,
        )
        with self.engine.averaged_weights():
            result = self.engine.evaluate(micro for batch in batches for micro in batch.split(self.plan.micro_size))
        best = not final and result.loss < self.best_val_loss
        if best:
            self.best_val_loss = result.loss
        record = EvaluationRecord(
            step=self.engine.global_step,
            val_loss=result.loss,
            val_bits_per_byte=bits_per_byte(result, self.held_out),
            tokens=result.tokens,
            time_s=time.perf_counter() - start_s,
            best=best,
        )
        self.last_evaluation = record
        if self.sinks is not None:
            self.sinks.evaluation(record)
        self.console.evaluation(record)
        for callback in self.callbacks:
            callback.on_evaluation(self, record)
        return record

    def save(self, best: bool = False) -> None:
        """Takes a checkpoint of this step, unless there is one. Collective."""
        path = self.checkpoints.save(self.engine, self.state, self._tensors, best=best)
        if path is not None:
            for callback in self.callbacks:
                callback.on_checkpoint(self, path)

    def state(self) -> dict[str, Any]:
        """What the loop keeps in a checkpoint beside the engine's state."""
        return {
            "data": self.loader.state_dict(),
            "global_size": self.plan.global_size,
            "steps": self.steps,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "training_time_s": self.training_time_s,
            "losses": self.spikes.state(),
            "callbacks": {callback.name: callback.state() for callback in self.callbacks if callback.name},
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for callback in self.callbacks for name, tensor in callback.tensors().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes `state` back."""
        self.loader.load_state_dict(state["data"], allow_change=self.resolved.config.data.allow_change)
        self.best_val_loss = math.inf if state["best_val_loss"] is None else float(state["best_val_loss"])
        self.training_time_s = float(state["training_time_s"])
        self.spikes.load(state.get("losses", []))


def bits_per_byte(result: Evaluation, split: TokenSplit) -> float | None:
    """Bits a byte of the text that `split` was encoded from; None where its bytes are not known."""
    if not split.num_bytes or not split.num_counted:
        return None
    return result.bits_per_byte(split.num_counted / split.num_bytes)


def open_data(config: DataConfig) -> tuple[TokenDataset, TokenSplit | None]:
    """The data set and its held-out split, None where that is too short to evaluate on."""
    dataset = open_dataset(config)
    held_out = dataset.split("held_out")
    return dataset, held_out if held_out.num_tokens >= 2 else None


def write_config(run_dir: Path, resolved: Resolved) -> None:
    """config.yaml of the run, on rank 0."""
    if distributed.is_main():
        storage.atomic_write_bytes(run_dir / "config.yaml", resolved.to_yaml().encode())
