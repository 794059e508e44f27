"""Memory of a rank while a pretrained Hugging Face model is loaded onto ZeRO-3 shards.

    python benchmarks/loading.py                       # a random Llama of 134.5M parameters, 4 ranks
    python benchmarks/loading.py --model FOLDER        # any Hugging Face folder
    python benchmarks/loading.py --small --ranks 2     # seconds

The claim: while loading, a rank's peak stays under (baseline + its shard + the largest tensor) + 15%. The baseline is
the process just before: interpreter, torch, transformers, the process group and the model without storage. `whole` is
beside it in the same run: every rank calls `from_pretrained` and the engine shards what it gets. Peaks are the kernel's
(VmHWM, reset before loading), pages of mapped files included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WAYS = ("slices", "whole")
MARGIN = 1.15


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak since `reset_peak`) of this process. Linux."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024


def reset_peak() -> None:
    """Sets VmHWM to the memory in use now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def load(way: str, folder: str) -> dict[str, Any]:
    """Loads the model of `folder` at stage 3 on this rank; its figures in bytes. Collective."""
    import torch
    import transformers

    from trainwright import distributed
    from trainwright.checkpoint.weights import local_part
    from trainwright.config import load_config
    from trainwright.model_source import fill_pretrained
    from trainwright.models.pretrained import build_causal
    from trainwright.startup import UserParts, build_engine

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    distributed.start()
    empty = build_causal(folder)
    sizes = [p.numel() * 4 for p in empty.parameters()]  # fp32 masters
    reset_peak()
    baseline = resident_bytes("VmRSS")
    model = empty if way == "slices" else transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    user = UserParts(load_weights=lambda shards: fill_pretrained(shards, folder)) if way == "slices" else UserParts()
    settings = load_config({"zero": 3, "precision": "bf16"})
    engine = build_engine(model, settings, user, horizon_steps=None)
    peak = resident_bytes("VmHWM")
    shard = sum(local_part(p)[0].nbytes for p in engine.module.parameters())
    bound = baseline + shard + max(sizes)
    return {
        "baseline": baseline, "model": sum(sizes), "shard": shard, "largest": max(sizes), "peak": peak,
        "ratio": peak / bound, "after": resident_bytes("VmRSS"),
    }  # fmt: skip


def rank_main(way: str, folder: str, out: str) -> None:
    """One rank; rank 0 writes all ranks' figures to `out`."""
    import torch.distributed as dist

    figures = load(way, folder)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, figures)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(everyone))


def random_llama(folder: Path, small: bool) -> None:
    """A Llama with random weights; its dimensions are SmolLM2-135M's, or tiny."""
    import torch
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    if small:
        shape = {"hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 1024}
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def measure(way: str, folder: Path, ranks: int, work: Path) -> list[dict[str, Any]]:
    """Every rank's figures, from processes of their own."""
    out = work / f"{way}.json"
    command = [sys.executable, __file__, "--rank-of", way, "--model", str(folder), "--out", str(out)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    job |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(command, env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{way}: the ranks ended with exit codes {codes}")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the table, sizes in MB (10^6 bytes)."""
    columns = ("baseline", "shard", "largest", "peak", "after")
    print(f"\nmodel {results['slices'][0]['model'] / 1e6:,.1f} MB in fp32; sizes in MB")
    print("{:8}{:>5}".format("way", "rank") + "".join(f"{name:>10}" for name in columns) + f"{'peak / bound':>14}")
    for way, ranks in results.items():
        for rank, figures in enumerate(ranks):
            sizes = "".join(f"{figures[name] / 1e6:10,.1f}" for name in columns)
            print(f"{way:8}{rank:5}{sizes}{figures['ratio']:14.3f}")
    worst = max(figures["ratio"] for figures in results["slices"])
    verdict = "holds" if worst <= MARGIN else "DOES NOT HOLD"
    print(f"bound = baseline + shard + largest tensor; peak <= {MARGIN} x bound {verdict}: {worst:.3f} at most")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: a random Llama of 134.5M parameters")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="a random Llama of 0.6M parameters")
    parser.add_argument(
        "--no-peer", action="store_true", help="leave out the way in which every rank loads the whole model"
    )
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--rank-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options.rank_of, options.model, options.out)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = Path(options.model) if options.model else work / "model"
        if not options.model:
            random_llama(folder, options.small)
        results = {way: measure(way, folder, options.ranks, work) for way in WAYS[: 1 if options.no_peer else 2]}
    report(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
