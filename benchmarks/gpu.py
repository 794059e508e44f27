"""On one GPU: tokens/s, memory and MFU of our engine beside plain compiled PyTorch and Hugging Face Trainer.

    python benchmarks/gpu.py [--shapes 124m 1b 8b] [--peers ...] [--rounds 3] [--steps 10] [--json FILE]

MFU is against a bf16 matrix product measured in the same run, and against the maker's dense peak. Each run is a process of its
own, interleaved; ratios pair two runs of a round. The 8b shape has 8B's widths and as many layers as its states (16 bytes
a parameter) leave room for on this device. `--shapes tiny --device cpu` runs the whole path anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainwright.monitor.flops import catalogue_flops, measure_matmul_flops

# vocabulary, width, layers, heads, key/value heads, feed-forward, tokens a sequence, sequences a step
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int]] = {
    "tiny": (512, 64, 2, 2, 2, 128, 64, 2),
    "124m": (50304, 768, 12, 12, 12, 2048, 1024, 32),
    "1b": (128256, 2048, 16, 32, 8, 8192, 4096, 4),
    "8b": (128256, 4096, 32, 32, 8, 14336, 8192, 1),
}
PEERS = ("trainwright", "trainwright_graphs", "trainwright_float8", "trainwright_hf", "plain_compiled", "hf_trainer")
LR, CLIP = 3e-4, 1.0


def sizes(name: str, device: str) -> dict[str, int]:
    """The shape; of 8b as many layers as fit."""
    vocab_size, dim, layers, heads, kv_heads, ffn_dim, length, rows = SHAPES[name]
    if name == "8b" and device == "cuda":
        free = torch.cuda.mem_get_info()[1] * 0.75
        head_dim = dim // heads
        block = dim * (2 * heads * head_dim + 2 * kv_heads * head_dim) + 3 * dim * ffn_dim
        layers = max(1, min(layers, int((free / 18 - 2 * vocab_size * dim) // block)))
    return {"vocab_size": vocab_size, "dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn_dim": ffn_dim,
            "length": length, "rows": rows}  # fmt: skip


def ours(s: dict[str, int], **more: Any) -> Callable[[], Any]:
    from trainwright.models.transformer import Transformer, TransformerSettings

    names = ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim")
    settings = TransformerSettings(
        **{name: s[name] for name in names},
        head_dim=s["dim"] // s["heads"],
        max_sequence_length=s["length"],
        tied=False,
    )
    return _engine(lambda: Transformer(settings), s, shifted=True, **more)


def _engine(model: Callable[[], torch.nn.Module], s: dict[str, int], shifted: bool, **more: Any) -> Callable[[], Any]:
    import trainwright as tw

    config = {
        "precision": "bf16",
        "gradient_clipping": CLIP,
        "optimizer": {"lr": LR},
        "recompute": recompute(s),
        **more,
    }
    engine = tw.initialize(model=model, config=config)
    batch = tokens(s, str(engine.device))
    if shifted:
        labels = torch.cat((batch[:, 1:], torch.full_like(batch[:, :1], -100)), dim=1)
    return lambda: engine.train_batch({"input_ids": batch, "labels": labels if shifted else batch.clone()})


def recompute(s: dict[str, int]) -> str:
    """Long sequences of wide models keep less."""
    return "selective" if s["dim"] >= 2048 else "none"


def tokens(s: dict[str, int], device: str) -> torch.Tensor:
    return torch.randint(0, s["vocab_size"], (s["rows"], s["length"]), device=device)


def llama(s: dict[str, int]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=s["vocab_size"], hidden_size=s["dim"], intermediate_size=s["ffn_dim"], num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], max_position_embeddings=s["length"],
            tie_word_embeddings=False, use_cache=False,
        )
    )  # fmt: skip


def plain_compiled(s: dict[str, int], device: str) -> Callable[[], Any]:
    """torch's own loop: autocast, fused AdamW, the whole model compiled."""
    model = llama(s).to(device)
    if recompute(s) != "none":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    compiled, batch = torch.compile(model), tokens(s, device)

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def hf_trainer(s: dict[str, int], device: str, steps: int) -> list[float]:
    """transformers.Trainer; seconds of each step."""
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=s["rows"], max_steps=steps + 1, bf16=True, learning_rate=LR,
        max_grad_norm=CLIP, use_cpu=device == "cpu", report_to=[], save_strategy="no", disable_tqdm=True, torch_compile=True,
        gradient_checkpointing=recompute(s) != "none",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens({**s, "rows": s["rows"] * (steps + 1)}, "cpu")]
    Trainer(llama(s), arguments, train_dataset=rows, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return [b - a for a, b in itertools.pairwise(ends)]


def run_one(given: argparse.Namespace) -> dict[str, Any]:
    """In this process: median seconds a step after the warm-up, peak bytes, FLOP a token."""
    s, device, warm_up = sizes(given.shape, given.device), given.device, 4
    peer, count = given.run, warm_up + given.steps
    if peer == "hf_trainer":
        seconds = hf_trainer(s, device, count)
    else:
        ways = {
            "trainwright": lambda: ours(s),
            "trainwright_graphs": lambda: ours(s, fused={"cuda_graphs": True}),
            "trainwright_float8": lambda: ours(s, precision={"dtype": "bf16", "float8": "tensorwise"}),
            "trainwright_hf": lambda: _engine(lambda: llama(s), s, shifted=False),
            "plain_compiled": lambda: plain_compiled(s, device),
        }
        step, seconds = ways[peer](), []
        for _ in range(count):
            began = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    head_dim = s["dim"] // s["heads"]
    block = s["dim"] * (2 * s["heads"] + 2 * s["kv_heads"]) * head_dim + 3 * s["dim"] * s["ffn_dim"]
    matrices = s["layers"] * block + s["vocab_size"] * s["dim"]
    flop = 6.0 * matrices + 12.0 * s["layers"] * s["heads"] * head_dim * s["length"]
    second = statistics.median(seconds[warm_up:])
    speed = s["rows"] * s["length"] / second
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    measured = measure_matmul_flops(kind, device)
    data_sheet = catalogue_flops(torch.cuda.get_device_name(), torch.bfloat16) if device == "cuda" else None
    return {
        "tokens_per_s": speed, "layers": s["layers"], "mfu_of_measured": flop * speed / measured,
        "mfu_of_peak": flop * speed / data_sheet if data_sheet else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }  # fmt: skip


def run(peer: str, shape: str, given: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own; {"error"} where it fails."""
    words = [
        sys.executable,
        __file__,
        "--run",
        peer,
        "--shape",
        shape,
        "--steps",
        str(given.steps),
        "--device",
        given.device,
    ]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=given.timeout, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {given.timeout:g} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        told = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        return {"error": next((line for line in reversed(told) if "Error" in line), told[-1])[:200]}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def compare(shape: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a peer: medians, and tokens/s of ours over it in the same round."""
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in given.peers}
    for number in range(given.rounds):
        for peer in list(runs):
            found = run(peer, shape, given)
            if "error" in found:
                print(f"{shape}: {peer} left out: {found['error']}", flush=True)
                del runs[peer]
                continue
            runs[peer].append(found)
            print(f"{shape}, round {number + 1}: {peer} {found['tokens_per_s']:,.0f} tokens/s", flush=True)
    rows = []
    for peer, found_runs in runs.items():
        row = {"shape": shape, "peer": peer, "layers": found_runs[0]["layers"]}
        for key in ("tokens_per_s", "mfu_of_measured", "mfu_of_peak", "peak_gb"):
            values = [f[key] for f in found_runs if f[key] is not None]
            row[key] = statistics.median(values) if values else None
        pairs = zip(runs.get("trainwright", []), found_runs, strict=False)
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
        row["ours_over_it"] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["124m", "1b", "8b"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout", type=float, default=400.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(0, "no CUDA GPU here: nothing to measure (--shapes tiny --device cpu tries the path)\n")
    if given.run:
        print("RESULT " + json.dumps(run_one(given)), flush=True)
        os._exit(0)
    rows = [row for shape in given.shapes for row in compare(shape, given)]
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"\n{name}, torch {torch.__version__}, bf16\n")
    print("| shape | layers | | tokens/s | MFU of the measured product | of the data sheet's | GB | ours / it |")
    print("|---|---|---|---|---|---|---|---|")

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        print(
            f"| {row['shape']} | {row['layers']} | {row['peer']} | {row['tokens_per_s']:,.0f} | {text(row['mfu_of_measured'], '.1%')} | "
            f"{text(row['mfu_of_peak'], '.1%')} | {text(row['peak_gb'], '.1f')} | {text(row['ours_over_it'], '.2f')} |"
        )
    if given.json:
        given.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
