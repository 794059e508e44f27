"""Choices measured: the fused loss beside torch's and beside whole logits, and what document masks cost.

    python benchmarks/fused.py [--what loss masks] [--rounds 7] [--threads 2] [--device cuda]

Everything lives in one process and takes turns; printed are medians of paired ratios and, for the loss, the memory that
forward and backward take beyond inputs and gradients (the allocator's peak; on CPUs the largest resident memory, each in
a process of its own).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from trainwright.fused.cross_entropy import linear_cross_entropy
from trainwright.models.transformer import Transformer, TransformerSettings

SHAPES = ((2048, 384, 8192), (2048, 384, 49152), (4096, 512, 32768))


def losses(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], None]]:
    """Forward and backward of each way to the loss, on [N, D] hidden states and a [V, D] weight."""
    tokens, width, vocab_size = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab_size, width, device=device, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), device=device, generator=generator)

    def clear() -> None:
        hidden.grad = weight.grad = None

    def ours() -> None:
        clear()
        loss_sum, count = linear_cross_entropy(hidden, weight, labels)
        (loss_sum / count).backward()

    def whole() -> None:
        clear()
        F.cross_entropy(F.linear(hidden, weight).float(), labels).backward()

    def torchs() -> None:
        clear()
        F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions()).backward()

    ways = {"ours": ours, "whole logits": whole}
    if hasattr(F, "linear_cross_entropy"):
        ways["torch's, chunked"] = torchs
    return ways


def interleaved(ways: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def peak_bytes(shape: tuple[int, int, int], name: str, dtype: torch.dtype, device: str) -> int:
    """Beyond inputs and gradients."""
    way = losses(shape, dtype, device)[name]
    tokens, width, vocab_size = shape
    gradients = (tokens + vocab_size) * width * dtype.itemsize
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before - gradients
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: a child starts with its parent's
    before = resident("VmRSS")
    way()
    return resident("VmHWM") - before - gradients


def resident(which: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) << 10


def show_losses(given: argparse.Namespace, dtype: torch.dtype) -> None:
    print(
        f"| N x D x V, {given.dtype} | way | seconds | ours / it | MB beyond inputs and gradients |\n|---|---|---|---|---|"
    )
    for shape in SHAPES:
        ways = losses(shape, dtype, given.device)
        times = interleaved(ways, given.rounds, given.device)
        for name in ways:
            words = [
                sys.executable,
                __file__,
                "--peak",
                name,
                "--shape",
                ",".join(map(str, shape)),
                "--dtype",
                given.dtype,
            ]
            words += ["--device", given.device, "--threads", str(given.threads)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            size = " x ".join(f"{side:,}" for side in shape)
            print(
                f"| {size} | {name} | {statistics.median(times[name]):.3f} | {ratio(times['ours'], times[name]):.2f} | "
                f"{int(done.stdout) / 1e6:,.0f} |",
                flush=True,
            )


def show_masks(given: argparse.Namespace, dtype: torch.dtype) -> None:
    """A step's forward and backward on packed sequences, with attention inside documents against across them."""
    settings = TransformerSettings(
        vocab_size=8192, dim=384, layers=6, heads=6, kv_heads=6, ffn_dim=1024, head_dim=64, max_sequence_length=1024
    )
    model = Transformer(settings).to(given.device, dtype)
    print(f"| tokens, {given.dtype} | documents a sequence | with masks / without |\n|---|---|---|")
    for rows, length, documents in ((8, 256, 4), (2, 1024, 8)):
        tokens = torch.randint(0, 8192, (rows, length), device=given.device)
        ids = (torch.arange(length, device=given.device) * documents // length).expand(rows, length)
        positions = (torch.arange(length, device=given.device) % (length // documents)).expand(rows, length)

        def step(tokens: torch.Tensor = tokens, **more: torch.Tensor) -> None:
            model(tokens, labels=tokens, **more).loss.backward()
            model.zero_grad()

        masks = {"document_ids": ids, "position_ids": positions}
        ways = {"without": step, "with": functools.partial(step, **masks)}
        times = interleaved(ways, given.rounds, given.device)
        print(f"| {rows} x {length:,} | {documents} | {ratio(times['with'], times['without']):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("loss", "masks"), default=["loss", "masks"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
    if given.peak:
        shape = tuple(int(side) for side in given.shape.split(","))
        print(peak_bytes(shape, given.peak, dtype, given.device))  # type: ignore[arg-type]
        return
    if "loss" in given.what:
        show_losses(given, dtype)
    if "masks" in given.what:
        show_masks(given, dtype)


if __name__ == "__main__":
    main()
