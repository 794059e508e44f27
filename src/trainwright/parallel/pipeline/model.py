"""The pipeline runner: forward and backward of a step's micro-batches through parts of the model on several ranks.

torch's schedules decide who computes what when, and send. Every rank of a replica is given the same micro-batches; the
first part takes the tokens, the last one the labels, and the loss is known on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from trainwright.config.schema import ParallelConfig
from trainwright.data.batch import Batch
from trainwright.errors import UsageError
from trainwright.mesh import Mesh
from trainwright.parallel.parallel_model import LossFunction, LossSum, ParallelModel, Part
from trainwright.parallel.pipeline.copies import TiedCopies
from trainwright.parallel.pipeline.cut import held_elsewhere, joined
from trainwright.parallel.pipeline.order import SPLIT_BACKWARD, Action, rank_of_part
from trainwright.parallel.pipeline.schedule import build_schedule
from trainwright.parallel.pipeline.stage import Boundary, PartRunner, Stage, StepUnderWay

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Shapes = tuple[tuple[int, ...], ...]


class PipelineModel(ParallelModel):
    """This rank's parts of the model, ascending, and the way of micro-batches through all of them."""

    def __init__(
        self,
        parts: Sequence[Part],
        mesh: Mesh,
        loss: LossFunction,
        aliases: dict[str, str],
        settings: ParallelConfig,
        whole_for: str = "",
    ) -> None:
        """whole_for: why zero-bubble schedules may not part backwards; the whole backward then runs in the first half's
        place. Recomputation would be done for each half (and each weight) anew, compiled blocks know no halves."""
        super().__init__(parts[0], mesh, loss, aliases)
        self.settings = settings
        self._whole_for = whole_for if settings.pipeline_schedule in SPLIT_BACKWARD else ""
        self.parts = tuple(parts)
        self.units = tuple(unit for part in parts for unit in part.units)
        self.module = joined([part.module for part in parts])
        self.actions: list[Action] = []
        """What this rank computed in the last step, in order."""
        self._runners = [PartRunner(part, loss, mesh.device) for part in parts]
        self._copies = TiedCopies([part.module for part in parts], mesh, settings)
        self._schedules: dict[tuple[int, Shapes], Any] = {}
        self._boundaries: dict[Shapes, Boundary] = {}

    # --- parameters ------------------------------------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of all parts; tied ones once, also where two parts of this rank hold a copy each."""
        found: dict[str, nn.Parameter] = {}
        for part in self.parts:
            for name, parameter in part.module.named_parameters():
                found.setdefault(name, parameter)
        return list(found.items())

    def state(self) -> list[tuple[str, Tensor]]:
        """As `ParallelModel.state`, of what this rank holds."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            for name, tensor in part.module.state_dict(keep_vars=True).items():
                if name not in self.aliases:
                    found.setdefault(name, tensor.detach())
        return list(found.items())

    def full_state(self) -> dict[str, Tensor]:
        """Whole weights on the CPU, on rank 0 only (empty elsewhere); tied names included. Collective."""
        mesh, group = self.mesh, self.mesh.group("pipeline")
        mine = [(name, tensor) for name, tensor in self.state() if name not in self._copies.second()]
        # Of the ranks with the same layers, one tells the main rank.
        speaks = all(mesh.coordinate(axis) == 0 for axis in ("replicate", "shard", "context", "tensor"))
        stage, main = mesh.coordinate("pipeline"), dist.get_rank() == 0
        table: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]] * mesh.degrees.pipeline
        if speaks:
            dist.all_gather_object(table, [(name, tuple(t.shape), t.dtype) for name, t in mine], group=group)
        full: dict[str, Tensor] = {}
        for name, tensor in mine:
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(mesh.device).contiguous()
            if main:
                full[name] = whole.cpu().clone()
            elif speaks:
                dist.send(whole, dst=self._rank_at(0), group=group)
        if main:
            for other in range(1, mesh.degrees.pipeline):
                for name, shape, dtype in table[other]:
                    whole = torch.empty(shape, dtype=dtype, device=mesh.device)
                    dist.recv(whole, src=self._rank_at(other), group=group)
                    full[name] = whole.cpu()
            full.update({alias: full[name] for alias, name in self.aliases.items()})
        assert stage == 0 or not main, "rank 0 is the first of its pipeline"
        return full

    def held_elsewhere(self) -> frozenset[str]:
        own = {name for part in self.parts for name in part.module.state_dict(keep_vars=True)}
        return frozenset().union(*(held_elsewhere(part.module) for part in self.parts)) - own

    def for_generation(self) -> nn.Module:
        raise UsageError(
            f"engine.generate with parallel.pipeline={self.settings.pipeline}",
            "token by token a pipeline has nothing to overlap: a rank would compute and the others wait",
            "engine.save(path), then an engine with parallel.pipeline=1 that loads it, or `trainwright generate RUN`",
        )

    def second_copies(self) -> frozenset[str]:
        """Names of tied weights whose first copy another rank holds."""
        return self._copies.second()

    def finish_gradients(self) -> None:
        """Sums the gradients of a tied weight over its copies, so that all of them are updated alike. Collective."""
        self._copies.sum_gradients()

    def describe(self) -> str:
        """Which blocks lie where, and what is held while micro-batches accumulate."""
        part = self._runners[0].of_model
        runs = [group[0] + (f" to {group[-1].rpartition('.')[2]}" if len(group) > 1 else "") for group in part.blocks]
        held = (
            "gradients are reduced every micro-batch"
            if self.parts[0].flags.reduces_every_micro_batch
            else "whole gradients are held until the last micro-batch"
        )
        whole = f"; backwards run whole, for {self._whole_for}" if self._whole_for else ""
        return f"Pipeline parts: {' | '.join(runs)}; {held}{whole}"

    def end_step(self) -> None:
        for part in self.parts:
            part.flags.reshard()

    # --- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            f"engine(...) with parallel.pipeline={self.settings.pipeline}",
            "in a pipeline the micro-batches of a step pass through the ranks together",
            "engine.train_batch(batch) for a whole step, engine.evaluate(batches) for losses",
        )

    def loss(self, micro_batch: Any) -> LossSum:
        """Forward only, through all parts; known on every rank. Collective."""
        self._copies.even()
        with torch.no_grad():
            found = [self.forward_through(piece) or self._no_loss() for piece in self._pieces(micro_batch)]
        return self._of_replica(found)

    def _pieces(self, micro_batch: Any) -> list[Any]:
        """A few rows each, so that the ranks are busy at once: a piece for each of them where the rows divide."""
        ranks = self.settings.pipeline
        if isinstance(micro_batch, Batch):
            return [micro_batch] if micro_batch.size % ranks else micro_batch.split(micro_batch.size // ranks)
        rows = {len(value) for value in micro_batch.values() if isinstance(value, Tensor) and value.ndim}
        if len(rows) != 1 or max(rows) % ranks:
            return [micro_batch]
        parts = {k: v.chunk(ranks) if isinstance(v, Tensor) and v.ndim else [v] * ranks for k, v in micro_batch.items()}
        return [{key: values[i] for key, values in parts.items()} for i in range(ranks)]

    def run(
        self,
        micro_batches: Sequence[Any],
        scale: float | Tensor,
        before: Callable[[int], Any],
        ahead: Callable[[Tensor], None],
    ) -> LossSum:
        """As `ParallelModel.run`, by the schedule; forwards and backwards mix, `ahead` is not called."""
        self._copies.even()
        step = StepUnderWay(micro_batches, scale, before)
        schedule = self._schedule(micro_batches)
        for runner in self._runners:
            runner.step = step
        index = torch.arange(len(micro_batches))
        try:
            schedule.step(index=index, target=index, return_outputs=False)
        finally:
            for runner in self._runners:
                runner.step = None
        self.actions = step.actions
        return self._of_replica([step.losses.get(i) or self._no_loss() for i in range(len(micro_batches))])

    def _no_loss(self) -> LossSum:
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return LossSum(zero, zero, zero)

    def _schedule(self, micro_batches: Sequence[Any]) -> Any:
        """The schedule for so many micro-batches of this shape; built at its first use."""
        shapes = {_shapes(micro_batch) for micro_batch in micro_batches}
        if len(shapes) > 1:
            raise UsageError(
                f"micro-batches of different shapes in one step: {sorted(shapes)}",
                "what passes between pipeline ranks has one shape in a step",
                f"a batch of {len(micro_batches)} x n rows, all padded to one length",
            )
        key = (len(micro_batches), shapes.pop())
        if key not in self._schedules:
            if key[1] not in self._boundaries:
                self._learn_boundaries(micro_batches[0], key[1])
            group = self.mesh.group("pipeline")
            stages = [Stage(r, group, self._boundaries[key[1]], bool(self._whole_for)) for r in self._runners]
            self._schedules[key] = build_schedule(self.settings, stages, key[0])
        return self._schedules[key]

    def expect(self, micro_batch: Any, message: tuple[tuple[int, ...], torch.dtype]) -> None:
        """Spares micro-batches like this one the forward that learns what passes between parts: `message` (shape, dtype).

        All boundaries lie between blocks on one residual stream, so that one message is every one's.
        """
        count = self._runners[0].of_model.count
        self._boundaries[_shapes(micro_batch)] = Boundary(dict.fromkeys(range(1, count), message))

    @torch.no_grad()
    def _learn_boundaries(self, micro_batch: Any, shapes: Shapes) -> None:
        """One forward without gradients, whose messages say their shapes: stages are given static ones."""
        was_training = self.module.training
        self.module.eval()
        received: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self.forward_through(micro_batch, received)
        self.module.train(was_training)
        self.end_step()
        self._boundaries[shapes] = Boundary(received)

    def forward_through(
        self, micro_batch: Any, seen: dict[int, tuple[tuple[int, ...], torch.dtype]] | None = None
    ) -> LossSum | None:
        """Forward of one micro-batch through all parts; its loss on the last part's rank. `seen` takes what passed into
        and out of this rank's parts."""
        seen = {} if seen is None else seen
        output: Tensor | LossSum | None = None
        for runner in self._runners:
            index = runner.of_model.index
            hidden: Tensor | None = None
            if index:
                here = rank_of_part(index - 1, self.settings) == self.mesh.coordinate("pipeline")
                assert not here or isinstance(output, Tensor), "the part before ran here"
                hidden = output if here and isinstance(output, Tensor) else self._receive(index - 1)
                seen[index] = (tuple(hidden.shape), hidden.dtype)
            output = runner.compute(hidden, micro_batch)
            if isinstance(output, Tensor):
                seen[index + 1] = (tuple(output.shape), output.dtype)
                if rank_of_part(index + 1, self.settings) != self.mesh.coordinate("pipeline"):
                    self._send(output, index + 1)
        return output if isinstance(output, LossSum) else None

    def _send(self, hidden: Tensor, to_part: int) -> None:
        header = [_DTYPES.index(hidden.dtype), hidden.ndim, *hidden.shape]
        to, group = self._rank_at(rank_of_part(to_part, self.settings)), self.mesh.group("pipeline")
        dist.send(torch.tensor(header + [0] * (10 - len(header)), device=self.mesh.device), dst=to, group=group)
        dist.send(hidden.contiguous(), dst=to, group=group)

    def _receive(self, from_part: int) -> Tensor:
        source, group = self._rank_at(rank_of_part(from_part, self.settings)), self.mesh.group("pipeline")
        header = torch.empty(10, dtype=torch.int64, device=self.mesh.device)
        dist.recv(header, src=source, group=group)
        kind, ndim, *shape = header.tolist()
        hidden = torch.empty(shape[:ndim], dtype=_DTYPES[kind], device=self.mesh.device)
        dist.recv(hidden, src=source, group=group)
        return hidden

    def _rank_at(self, stage: int) -> int:
        """Global rank of a pipeline rank of this pipeline."""
        return dist.get_global_rank(self.mesh.group("pipeline"), stage)


def _shapes(micro_batch: Any) -> Shapes:
    values: Iterator[Any] = iter(
        vars(micro_batch).values() if hasattr(micro_batch, "__dict__") else tree_leaves(micro_batch)
    )
    return tuple(tuple(value.shape) for value in values if isinstance(value, Tensor))
