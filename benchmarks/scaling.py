"""Weak scaling: tokens/s a rank on 1, 2 and 4 ranks, one thread each, 1,024 tokens a rank and step; ours beside our peers.

    .venv-peers/bin/python benchmarks/scaling.py [--ranks 1 2] [--peers trainwright fsdp2 deepspeed] [--json FILE]

Rounds are interleaved, and a share pairs two runs of one round. More ranks than cores share the cores: look at
shares where the machine has a core for each rank. Of each run the median step counts, after its first ones: new memory and
sockets that find their size make those slower, by up to a tenth on several ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
from pathlib import Path
from typing import Any

from peer_loops import NEEDS, PEERS
from peers import SETTINGS, run


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a peer and number of ranks: tokens/s a rank, and the share of those on the first number of ranks."""
    os.environ["TRAINWRIGHT_BENCHMARK_THREADS"] = "1"
    base = SETTINGS["two_ranks"]
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(given.rounds):
        for peer in given.peers:
            for ranks in given.ranks:
                got = run(peer, dataclasses.replace(base, ranks=ranks), given.stage, given)
                if "error" in got:
                    print(f"{peer} on {ranks}: {got['error']}")
                    continue
                found.setdefault((peer, ranks), []).append(got["tokens_per_s"])
                print(f"round {number + 1}: {peer} on {ranks}: {got['tokens_per_s']:,.0f} tokens/s a rank", flush=True)
    rows = []
    for (peer, ranks), speeds in found.items():
        alone = found.get((peer, given.ranks[0]), [])
        shares = [a / b for a, b in zip(speeds, alone, strict=False)]
        share = statistics.median(shares) if shares else None
        rows.append({"peer": peer, "ranks": ranks, "tokens_per_s": statistics.median(speeds), "share": share})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["trainwright", "fsdp2", "deepspeed"])
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--timeout", type=float, default=1200.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for peer in [p for p in given.peers if p in NEEDS and importlib.util.find_spec(NEEDS[p]) is None]:
        print(f"{peer} left out, {NEEDS[peer]} is not installed (make peers)")
        given.peers.remove(peer)
    rows = measure(given)
    print(
        f"\n| peer (stage {given.stage}, {given.precision}) | ranks | tokens/s a rank | of that on {given.ranks[0]} |"
    )
    print("|---|---|---|---|")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        print(f"| {row['peer']} | {row['ranks']} | {row['tokens_per_s']:,.0f} | {share} |")
    if given.json:
        given.json.write_text(json.dumps({"stage": given.stage, "precision": given.precision, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
