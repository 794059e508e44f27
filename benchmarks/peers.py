"""The same model, data, batch, precision and number of steps through us and our peers, side by side.

    make peers                                                  # their environment, once: .venv-peers
    .venv-peers/bin/python benchmarks/peers.py [--shapes v8k v49k two_ranks] [--rounds 5] [--json FILE]

Every peer runs in a process of its own; a round runs each once, and a ratio pairs two runs of one round, so that a noisy
machine slows both. Printed: medians over the rounds of the ratio of tokens/s and of peak memory, ours over the peer's.
A peer that is not installed is left out, with the reason. Loops: `peer_loops.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_loops import LENGTH, NEEDS

LOOPS = Path(__file__).with_name("peer_loops.py")


@dataclass(frozen=True)
class Setting:
    """A shape and who runs it; `ours` is what the others are compared with."""

    vocab_size: int
    ranks: int
    rows: int
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    stages: tuple[int, ...] = (2,)


_ALONE = ("plain", "plain_compiled", "hf_trainer", "accelerate", "deepspeed")
SETTINGS = {
    "v8k": Setting(8192, 1, 8, ("trainwright", "trainwright_eager", "trainwright_hf"), _ALONE),
    "v49k": Setting(49152, 1, 8, ("trainwright", "trainwright_eager", "trainwright_hf"), _ALONE),
    "two_ranks": Setting(8192, 2, 4, ("trainwright",), ("deepspeed", "fsdp2", "fsdp2_fused", "ddp"), (1, 2, 3)),
}


def run(peer: str, setting: Setting, stage: int, given: argparse.Namespace) -> dict[str, Any]:
    """One process (or one a rank): tokens/s a rank, peak MB of rank 0, the last loss; or {"error"}."""
    words = [
        str(LOOPS), peer, "--vocab-size", str(setting.vocab_size), "--rows", str(setting.rows), "--stage", str(stage),
        "--steps", str(given.warmup + given.steps), "--precision", given.precision,
    ]  # fmt: skip
    threads = int(os.environ.get("TRAINWRIGHT_BENCHMARK_THREADS", max(1, (os.cpu_count() or 1) // setting.ranks)))
    command = [sys.executable, *words]
    if setting.ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)]
        command = [sys.executable, *launch, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=given.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {given.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        told = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        return {"error": next((line for line in reversed(told) if "Error" in line), told[-1])[:200]}
    found = json.loads(lines[-1].removeprefix("RESULT "))
    seconds = statistics.median(found["seconds"][given.warmup - 1 :])
    return {**found, "tokens_per_s": setting.rows * LENGTH / seconds}


def compare(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a setting: ours over each peer's, medians over the rounds."""
    setting, rows = SETTINGS[name], []
    for stage in setting.stages:
        label = name if len(setting.stages) == 1 else f"{name}, stage {stage}"
        everyone = [peer for peer in (*setting.ours, *setting.peers) if not given.only or peer in given.only]
        absent = {p: NEEDS[p] for p in everyone if p in NEEDS and importlib.util.find_spec(NEEDS[p]) is None}
        for peer, package in absent.items():
            print(f"{label}: {peer} left out, {package} is not installed (make peers)")
        left = [peer for peer in everyone if peer not in absent]
        runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in left}
        for number in range(given.rounds):
            for peer in list(left):
                found = run(peer, setting, stage, given)
                if "error" in found:
                    print(f"{label}: {peer} left out: {found['error']}")
                    left.remove(peer)
                    continue
                runs[peer].append(found)
                speed, peak = found["tokens_per_s"], found["peak_mb"]
                print(
                    f"{label}, round {number + 1}: {peer} {speed:,.0f} tokens/s a rank, {peak:,.0f} MB, {found['loss']:.3f}",
                    flush=True,
                )
        for ours in (peer for peer in setting.ours if peer in left):
            rows += [_row(label, ours, peer, runs) for peer in left if peer not in setting.ours]
    return rows


def _row(label: str, ours: str, peer: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    pairs = list(zip(runs[ours], runs[peer], strict=True))
    beyond = [(a["peak_mb"] - a["baseline_mb"]) / (b["peak_mb"] - b["baseline_mb"]) for a, b in pairs]
    return {
        "shape": label, "ours": ours, "peer": peer,
        "tokens_per_s_ratio": statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs),
        "peak_memory_ratio": statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in pairs),
        "peak_beyond_import_ratio": statistics.median(beyond),
        "tokens_per_s": statistics.median(a["tokens_per_s"] for a, _ in pairs),
        "peer_tokens_per_s": statistics.median(b["tokens_per_s"] for _, b in pairs),
        "peak_mb": statistics.median(a["peak_mb"] for a, _ in pairs),
        "peer_peak_mb": statistics.median(b["peak_mb"] for _, b in pairs),
        "loss": pairs[-1][0]["loss"], "peer_loss": pairs[-1][1]["loss"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", default=[], help="these peers alone (ours among them)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [row for name in given.shapes for row in compare(name, given)]
    print(
        "\n| shape | ours | peer | tokens/s, ours / peer | peak memory, ours / peer | beyond the imports |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['shape']} | {row['ours']} | {row['peer']} | {row['tokens_per_s_ratio']:.2f} ({row['tokens_per_s']:,.0f} / "
            f"{row['peer_tokens_per_s']:,.0f}) | {row['peak_memory_ratio']:.2f} ({row['peak_mb']:,.0f} / "
            f"{row['peer_peak_mb']:,.0f} MB) | {row['peak_beyond_import_ratio']:.2f} |"
        )
    if given.json:
        given.json.write_text(
            json.dumps({"precision": given.precision, "rounds": given.rounds, "rows": rows}, indent=1)
        )
    ahead = sum(row["tokens_per_s_ratio"] > 1 for row in rows)
    print(
        f"\nahead in tokens/s in {ahead} of {len(rows)} comparisons, medians of {given.rounds} paired rounds, {given.precision}"
    )


if __name__ == "__main__":
    main()
