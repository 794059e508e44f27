"""Pipeline schedules side by side: idle shares, activations held, bytes and seconds.

    python benchmarks/pipeline.py                                       # the plan alone: needs no processes
    python benchmarks/pipeline.py --measure --shards 1                  # runs every schedule on Gloo ranks, too

The idle share comes from replaying what torch's schedule calls for on each rank with unit costs (forward = backward of
inputs = backward of weights = 1); beside it the formula of the schedule's paper, and how many micro-batches' activations
each rank holds at most (counted once a part, in units of a part). `--measure` adds the most bytes that autograd kept for
backward on each rank, of one step at ZeRO 2 with gradients reduced every micro-batch, as Trainwright does, and held
whole until the last one, as torch's own stage does: seconds a step and bytes of unsharded gradients at the end of a
micro-batch's backward. `--json FILE` writes all rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trainwright.config.schema import ParallelConfig
from trainwright.parallel.pipeline.order import idle_formula, parts_a_rank, replay
from trainwright.parallel.pipeline.schedule import recorded_orders

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv")
TURNS = 9


def plan(schedule: str, ranks: int, micro_batches: int) -> dict[str, Any]:
    """What the schedule would do, from its actions alone."""
    parallel = ParallelConfig(pipeline=ranks, pipeline_schedule=schedule)
    found = replay(recorded_orders(parallel, micro_batches))
    return {
        "schedule": schedule,
        "parts_a_rank": parts_a_rank(parallel),
        "idle": found.idle,
        "idle_formula": idle_formula(parallel, micro_batches),
        # A rank's layers are cut into its parts: shares of what one micro-batch keeps on the whole rank.
        "held_micro_batches": [held / parts_a_rank(parallel) for held in found.held],
    }


def _measure(rank: int, schedule: str, ranks: int, micro_batches: int) -> dict[str, Any]:
    """One rank's figures. Two engines take turns, so that a neighbour on the machine disturbs both alike."""
    import trainwright as tw
    from trainwright.models.transformer import Transformer, TransformerSettings

    settings = TransformerSettings(
        2048, dim=128, layers=2 * ranks, heads=4, kv_heads=4, head_dim=32, ffn_dim=384, tied=False
    )
    config = {
        "parallel": {"pipeline": ranks, "pipeline_schedule": schedule}, "zero": 2, "batch": {"accumulation": micro_batches},
    }  # fmt: skip
    engines = {name: tw.initialize(model=lambda: Transformer(settings), config=config) for name in ("reduced", "held")}
    parts = engines["held"].parts.model.parts
    for part in parts:
        part.flags._stage = 1  # accumulates whole gradients, reduces at the last
    tokens = torch.randint(2048, (micro_batches * 2, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    for engine in engines.values():
        engine.train_batch(batch)
    kept = _KeptForBackward()
    with kept:
        engines["reduced"].train_batch(batch)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(TURNS):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.train_batch(batch)
            seconds[name].append(time.perf_counter() - start)
    stage = engines["held"].parts.mesh.coordinate("pipeline")
    whole_bytes = sum(_whole_gradient_bytes(part.module) for part in parts)
    for engine in engines.values():
        engine.close()
    return {
        "stage": stage,
        "activation_bytes": kept.most_bytes,
        "step_s": {name: statistics.median(times) for name, times in seconds.items()},
        "gradient_bytes": whole_bytes,
    }


def _whole_gradient_bytes(module: torch.nn.Module) -> int:
    """Of unsharded fp32 gradients of the module's parameters."""
    return sum(parameter.numel() * 4 for parameter in module.parameters())


class _KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of tensors that autograd keeps, each storage once, until their graph lets go of them."""

    def __init__(self) -> None:
        self.now: dict[int, list[int]] = {}
        self.most_bytes = self.bytes = 0
        super().__init__(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Kept:
        return _Kept(tensor, self)


class _Kept:
    """One kept tensor; parameters and views of them are not activations."""

    def __init__(self, tensor: torch.Tensor, counter: _KeptForBackward) -> None:
        self.tensor, self.counter = tensor.detach(), counter  # the tensor itself would hold its node, which holds it
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter)
        self.key = 0 if is_weight else tensor.untyped_storage().data_ptr()
        if self.key:
            entry = counter.now.setdefault(self.key, [0, tensor.untyped_storage().nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                counter.bytes += entry[1]
                counter.most_bytes = max(counter.most_bytes, counter.bytes)

    def __del__(self) -> None:
        if self.key:
            entry = self.counter.now[self.key]
            entry[0] -= 1
            if not entry[0]:
                self.counter.bytes -= self.counter.now.pop(self.key)[1]


def measure(schedule: str, ranks: int, micro_batches: int, shards: int) -> dict[str, Any]:
    """Runs the schedule on `ranks` x `shards` Gloo ranks of this machine."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from ranks import run_ranks

    rows = run_ranks(_measure, ranks * shards, schedule, ranks, micro_batches)
    return {
        "activation_bytes": [max(r["activation_bytes"] for r in rows if r["stage"] == s) for s in range(ranks)],
        "step_s": {name: max(row["step_s"][name] for row in rows) for name in ("reduced", "held")},
        "whole_gradient_bytes_held": [max(r["gradient_bytes"] for r in rows if r["stage"] == s) for s in range(ranks)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--shards", type=int, default=2, help="ranks that share each stage when measuring (ZeRO 2)")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{arguments.ranks} ranks, {arguments.micro_batches} micro-batches")
    print(f"{'schedule':<18}{'parts':>6}{'idle':>9}{'formula':>9}  micro-batches held, by rank")
    for schedule in arguments.schedules:
        row = plan(schedule, arguments.ranks, arguments.micro_batches)
        held = " ".join(f"{value:g}" for value in row["held_micro_batches"])
        print(f"{schedule:<18}{row['parts_a_rank']:>6}{row['idle']:>9.2%}{row['idle_formula']:>9.2%}  {held}")
        if arguments.measure:
            row |= measure(schedule, arguments.ranks, arguments.micro_batches, arguments.shards)
            megabytes = " ".join(f"{value / 1e6:.2f}" for value in row["activation_bytes"])
            whole = " ".join(f"{value / 1e6:.2f}" for value in row["whole_gradient_bytes_held"])
            print(
                f"{'':<18}kept for backward, MB: {megabytes}; a step: {row['step_s']['reduced']:.2f} s with gradients"
            )
            print(f"{'':<18}reduced every micro-batch, {row['step_s']['held']:.2f} s held whole (MB more: {whole})")
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
