"""The planner's forecast of memory and step time on this machine's processors, against trainings of the real thing.

    python benchmarks/planner_here.py [--rounds 3] [--only NAME ...] [--json FILE] [--again]

Each case trains in processes of its own, after the forecast was made; memory is the peak of rank 0 beyond what the process
held before it had a model. Printed: case by case (medians of the rounds), the medians of the errors, and how often of two
strategies that differ by more than 10% the faster one was told. --again measures the machine's rates anew in each round.

Shared machines change their speed from minute to minute: after each training its ranks take the reference step that the rates
were held against, too, and the step's time is put at the speed that the machine had then. The raw time is printed beside it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = {"dim": 128, "layers": 4, "heads": 2}
MEDIUM = {"dim": 384, "layers": 6, "heads": 6}
LARGE = {"dim": 640, "layers": 10, "heads": 10}


def case(ranks: int, model: dict[str, Any], vocab: int, length: int, rows: int, **config: Any) -> dict[str, Any]:
    return {"ranks": ranks, "vocab": vocab, "config": {
        "precision": "fp32", "optimizer": {"lr": 1e-4}, "gradient_clipping": 1.0, "data": {"sequence_length": length},
        "model": {"transformer": model}, "batch": {"global_size": rows}, "guard": {"watch": False}, **config,
    }}  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "1M, 1 rank": case(1, SMALL, 4096, 128, 16),
    "1M, 1 rank, micro 4": case(1, SMALL, 4096, 128, 16, batch={"global_size": 16, "micro_size": 4}),
    "1M, 2 ranks, ZeRO 0": case(2, SMALL, 4096, 128, 16, zero=0),
    "1M, 2 ranks, ZeRO 2": case(2, SMALL, 4096, 128, 16, zero=2),
    "1M, 4 ranks, ZeRO 3": case(4, SMALL, 4096, 128, 16, zero=3),
    "6M, 50k words": case(1, {"dim": 96, "layers": 4, "heads": 2}, 50000, 256, 4),
    "6M, 50k words, whole loss": case(1, {"dim": 96, "layers": 4, "heads": 2}, 50000, 256, 4) | {"whole": True},
    "17M, 1 rank": case(1, MEDIUM, 8192, 256, 4),
    "17M, 1 rank, bf16": case(1, MEDIUM, 8192, 256, 4, precision="bf16"),
    "17M, recompute full": case(1, MEDIUM, 8192, 256, 8, recompute="full"),
    "17M, recompute selective": case(1, MEDIUM, 8192, 256, 8, recompute="selective"),
    "17M, no recompute": case(1, MEDIUM, 8192, 256, 8),
    "17M, T 1,024": case(1, MEDIUM, 8192, 1024, 2),
    "17M, 2 ranks, ZeRO 0": case(2, MEDIUM, 8192, 256, 4, zero=0),
    "17M, 2 ranks, ZeRO 1": case(2, MEDIUM, 8192, 256, 4, zero=1),
    "17M, 2 ranks, ZeRO 2": case(2, MEDIUM, 8192, 256, 4, zero=2),
    "17M, 2 ranks, ZeRO 3": case(2, MEDIUM, 8192, 256, 4, zero=3),
    "17M, 2 ranks, ZeRO 2, micro 1": case(2, MEDIUM, 8192, 256, 4, zero=2, batch={"global_size": 4, "micro_size": 1}),
    "17M, 2 ranks, ZeRO 3, micro 1": case(2, MEDIUM, 8192, 256, 4, zero=3, batch={"global_size": 4, "micro_size": 1}),
    "17M, 4 ranks, ZeRO 3": case(4, MEDIUM, 8192, 256, 4, zero=3),
    "43M, 50k words, 1 rank": case(1, MEDIUM, 43000, 256, 4),
    "70M, 1 rank": case(1, LARGE, 16384, 256, 2),
    "70M, 2 ranks, ZeRO 3": case(2, LARGE, 16384, 256, 2, zero=3),
    "100M, 2 ranks, ZeRO 2": case(2, {"dim": 768, "layers": 12, "heads": 12}, 16384, 128, 2, zero=2),
}  # fmt: skip


def model_of(given: dict[str, Any]) -> Any:
    """A callable that builds the case's model; `whole`: behind a loss of its own over whole logits."""
    import torch

    from trainwright.config import load_config
    from trainwright.models.build import build

    class WholeLoss(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.model(input_ids).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    model = load_config(given["config"]).config.model
    assert model is not None
    return lambda: WholeLoss(build(model, given["vocab"])) if given.get("whole") else build(model, given["vocab"])


def train(argv: list[str]) -> int:
    """On a rank: [case as JSON, steps, file for rank 0's figures]."""
    import psutil
    import torch

    import trainwright as tw
    from trainwright import distributed
    from trainwright.config import load_config
    from trainwright.planner import timing

    given, steps, out = json.loads(argv[0]), int(argv[1]), argv[2]
    resolved = load_config(given["config"])
    world = distributed.start("gloo")
    gc.collect()
    before = psutil.Process().memory_info().rss
    engine = tw.initialize(model=model_of(given), config=resolved)
    rows = -(-given["config"]["batch"]["global_size"] // engine.parts.mesh.data_parallel_size)
    tokens = torch.randint(0, given["vocab"], (rows, resolved.config.data.sequence_length + 1))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    seconds = []
    for step in range(steps + 2):
        began = time.perf_counter()
        engine.train_batch(batch)
        if step >= 2:
            seconds.append(time.perf_counter() - began)
    peak = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    engine.close()
    reference_s = statistics.median(timing.reference().seconds)
    if world.rank == 0:
        figures = {"seconds": statistics.median(seconds), "bytes": peak - before, "reference_s": reference_s}
        Path(out).write_text(json.dumps(figures))
    distributed.shutdown()
    return 0


def measured(given: dict[str, Any], predicted_s: float) -> dict[str, float]:
    import subprocess

    steps = max(4, min(30, round(6 / predicted_s)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        command = [sys.executable, __file__, "--rank", json.dumps(given), str(steps), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def launch(argv: list[str]) -> int:
    from trainwright.launch.run import launch_local

    sys.path.insert(0, str(Path(__file__).parent))
    import os

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as logs:
        return launch_local(argv, json.loads(argv[0])["ranks"], logs, entry="planner_here:train")


def predicted(given: dict[str, Any]) -> tuple[Any, float]:
    """(the forecast, seconds of the reference step when the machine was measured)."""
    from trainwright.config import load_config
    from trainwright.planner.calibrate import rates_here
    from trainwright.planner.forecast import forecast

    rates = rates_here(given["ranks"], ("float32", "bfloat16"))
    config = load_config(given["config"])
    told = forecast(config, given["ranks"], rates, model=model_of(given), vocab_size=given["vocab"])
    return told, rates.reference_s


def measure_machine(ranks: set[int]) -> None:
    from trainwright.planner.calibrate import rates_here

    for count in sorted(ranks):
        rates_here(count, ("float32", "bfloat16"), again=True)


def main() -> None:
    if "--rank" in sys.argv:
        sys.exit(launch(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="over all cases; medians count")
    parser.add_argument("--only", nargs="+", default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help="measure the machine's rates anew in each round")
    options = parser.parse_args()
    tries: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        if options.again:
            measure_machine({CASES[name]["ranks"] for name in options.only})
        for name in options.only:
            told, reference_s = predicted(CASES[name])
            run = measured(CASES[name], told.time.total)
            speed = reference_s / run["reference_s"]
            run |= {"raw_s": run["seconds"], "seconds": run["seconds"] * speed, "speed": speed}
            tries[name].append(run | {"told_s": told.time.total, "told_bytes": told.memory_bytes})
            print(
                f"{name:34} {run['raw_s'] * 1e3:9.1f} at {speed:.2f} of the speed {told.time.total * 1e3:9.1f}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    rows: list[dict[str, Any]] = []
    print(
        f"{'case':34} {'raw ms':>9} {'speed':>7} {'step ms':>9} {'told':>9} {'error':>7}   {'MB':>7} {'told':>7} {'error':>7}"
    )
    for name, found in tries.items():
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.append({"case": name, "ranks": CASES[name]["ranks"], **row})
        errors = row["told_s"] / row["seconds"] - 1, row["told_bytes"] / row["bytes"] - 1
        print(
            f"{name:34} {row['raw_s'] * 1e3:9.1f} {row['speed']:7.2f} {row['seconds'] * 1e3:9.1f} "
            f"{row['told_s'] * 1e3:9.1f} {errors[0]:+7.0%}   "
            f"{row['bytes'] / 1e6:7.0f} {row['told_bytes'] / 1e6:7.0f} {errors[1]:+7.0%}",
            flush=True,
        )
    times = [abs(row["told_s"] / row["seconds"] - 1) for row in rows]
    raw = statistics.median(abs(row["told_s"] / row["raw_s"] - 1) for row in rows)
    sizes = [abs(row["told_bytes"] / row["bytes"] - 1) for row in rows]
    pairs = [
        (a, b)
        for a, b in itertools.combinations(rows, 2)
        if a["case"].split(",")[0] == b["case"].split(",")[0] and max(a["seconds"], b["seconds"]) > 1.1 * min(a["seconds"], b["seconds"])
    ]  # fmt: skip
    right = sum((a["seconds"] > b["seconds"]) == (a["told_s"] > b["told_s"]) for a, b in pairs)
    print(
        f"step time: median error {statistics.median(times):.1%} ({raw:.1%} raw), worst {max(times):.0%}; "
        f"memory: median {statistics.median(sizes):.1%}, "
        f"worst {max(sizes):.0%}; of {len(pairs)} pairs of one model that differ by more than 10%, {right} in the right order"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
