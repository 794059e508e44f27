"""Runs a short two-rank training many times and counts exit codes: after FSDP2 on Gloo, a process that ends without an
orderly shutdown aborts now and then.

    python benchmarks/teardown.py [--runs 200] [--jobs 2]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "tests" / "launched.py"


def one_run(_: int) -> tuple[int, ...]:
    """Exit codes of both ranks of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT)]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "TRAINWRIGHT_RENDEZVOUS": f"file://{folder}/rendezvous",
        }  # fmt: skip
        ranks = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        return tuple(rank.wait(timeout=300) for rank in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    found: Counter[tuple[int, ...]] = Counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done, codes in enumerate(pool.map(one_run, range(arguments.runs)), start=1):
            found[codes] += 1
            if done % 20 == 0:
                print(f"{done} runs: {dict(found)}", flush=True)
    sys.exit(0 if set(found) == {(0, 0)} else 1)


if __name__ == "__main__":
    main()
