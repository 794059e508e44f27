"""`strategy: auto` against ZeRO 0 to 3 by hand, on the quickstart, taking turns.

    python benchmarks/auto.py --data tw/data/plays [--ranks 1 2 4] [--rounds 2] [--steps 40]

Each run is a training of its own (examples/quickstart.yaml for some steps); what is compared is the median time of its steps,
the first ten left out. By hand: the micro-batch that the quickstart has, or all of a rank's rows where they are fewer.
Printed: auto's speed over that of the fastest by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
BY_HAND = {f"ZeRO {stage}": [f"zero.stage={stage}"] for stage in range(4)}
WAYS = {"auto": ["strategy=auto", "zero=null", "batch={global_size: 16}"], **BY_HAND}


def step_s(way: str, ranks: int, data: str, steps: int) -> tuple[float, str]:
    """(median seconds of a step, what auto said)."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"data.path={data}",
            "duration=null",
            f"steps={steps}",
            f"run_dir={folder}/run",
            "evaluate={every: 0, batches: 1}",
        ]
        words += ["evaluate.final_batches=1", "checkpoint.at_end=false", *WAYS[way]]
        command = [sys.executable, "-m", "trainwright.cli", "train", str(QUICKSTART), *words, "--nproc", str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        times = [row["step_time_s"] for row in rows if "step_time_s" in row][10:]
        said = next((line for line in done.stdout.splitlines() if line.startswith("strategy auto")), "")
        return statistics.median(times), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    for ranks in given.ranks:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        told = ""
        for _ in range(given.rounds):
            for way in WAYS:
                seconds, said = step_s(way, ranks, given.data, given.steps)
                times[way].append(seconds)
                told = said or told
        ratios = [min(times[way][i] for way in BY_HAND) / times["auto"][i] for i in range(given.rounds)]
        each = ", ".join(f"{way} {statistics.median(found) * 1e3:,.0f} ms" for way, found in times.items())
        print(
            f"{ranks} rank(s): auto / the best by hand {statistics.median(ratios):.2f} ({each})\n    {told}", flush=True
        )


if __name__ == "__main__":
    main()
