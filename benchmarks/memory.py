"""Bytes that a rank holds at each ZeRO stage, measured, beside the table of docs/concepts.md.

    python benchmarks/memory.py [--ranks 4] [--json FILE]

Counts the storages of all live tensors of each rank (garbage collector, each storage once): between two steps, and after
a micro-batch that is not the last. bf16 with fp32 reduction, AdamW, dimensions that divide. What the communication
library and the allocator hold is not in it; buffers of a unit on its way are listed apart (transient).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

STAGES = (0, 1, 2, 3)


def live_bytes() -> dict[int, tuple[int, torch.dtype]]:
    """Storage address -> (bytes, dtype) of every live tensor."""
    gc.collect()
    found: dict[int, tuple[int, torch.dtype]] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or thing.is_meta:  # isinstance() would wake lazy proxies
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            local = getattr(tensor, "_local_tensor", tensor)
            if local is None or type(local) not in (torch.Tensor, torch.nn.Parameter):
                continue
            storage = local.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = (storage.nbytes(), local.dtype)
    return found


def measure(rank: int, stages: tuple[int, ...] = STAGES) -> list[dict[str, Any]]:
    """One row a stage, on this rank."""
    import trainwright as tw
    from trainwright.models.transformer import Transformer, TransformerSettings

    world_size = dist.get_world_size()
    settings = TransformerSettings(
        vocab_size=2048, dim=128, layers=16, heads=4, kv_heads=4, ffn_dim=352, head_dim=32, tied=True
    )
    rows = []
    for stage in stages:
        before = live_bytes()
        config = {"zero": stage, "precision": "bf16", "batch": {"accumulation": 2}}
        engine = tw.initialize(model=lambda: Transformer(settings), config=config)
        parameters = sum(p.numel() for p in engine.module.parameters())
        tokens = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(rank))
        engine.train_batch({"input_ids": tokens, "labels": tokens})

        def new(known: dict[int, Any] = before) -> dict[int, tuple[int, torch.dtype]]:
            return {address: value for address, value in live_bytes().items() if address not in known}

        between = new()
        loss = engine(tokens[:1], labels=tokens[:1]).loss
        engine.backward(loss)
        del loss
        during = {address: value for address, value in new().items() if address not in between}
        # The engine's parameters are the shards; at stages 0-2 the module holds whole ones just now.
        shards = [p for _, p in engine.parts.update.parameters]
        gradients = {p.grad.to_local().untyped_storage().data_ptr() for p in shards if p.grad is not None}
        # Without reduction nothing but the accumulated gradients is fp32 and new.
        grad_bytes = sum(n for a, (n, t) in during.items() if t == torch.float32 and (a in gradients or stage < 2))
        whole = {p.untyped_storage().data_ptr() for p in engine.module.parameters() if type(p) is torch.nn.Parameter}
        parameter_bytes = sum(n for a, (n, _) in during.items() if a in whole)
        rows.append(
            {
                "stage": stage,
                "parameters": parameters,
                "between_steps": sum(n for n, t in between.values() if t == torch.float32),
                "expected_between": 12 * parameters // (world_size if stage else 1),
                "gradients": grad_bytes,
                "expected_gradients": 4 * parameters // (world_size if stage >= 2 else 1),
                "whole_parameters": parameter_bytes,
                "expected_parameters": 2 * parameters if stage < 3 else 0,
                "transient": sum(n for n, _ in during.values()) - grad_bytes - parameter_bytes,
            }
        )
        engine.step() if engine.is_boundary else None
        engine.close()
        del engine
    return rows


def worst_deviation(rows: list[dict[str, Any]]) -> float:
    """Largest relative difference between a measured figure and the table's."""
    pairs = [
        ("between_steps", "expected_between"),
        ("gradients", "expected_gradients"),
        ("whole_parameters", "expected_parameters"),
    ]
    return max(abs(row[a] / row[b] - 1) if row[b] else float(row[a] > 0) for row in rows for a, b in pairs)


def main() -> None:
    from ranks import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = run_ranks(measure, arguments.ranks)
    rows = results[0]
    print(
        f"{rows[0]['parameters']:,} parameters on {arguments.ranks} ranks, bf16; bytes a parameter held by a rank, measured (expected)"
    )
    print(f"{'stage':>5} {'between steps':>20} {'+ gradients':>20} {'+ whole parameters':>20} {'transient':>10}")
    for row in rows:
        p = row["parameters"]
        cells = [
            f"{row[a] / p:8.3f} ({row[b] / p:6.3f})"
            for a, b in (
                ("between_steps", "expected_between"),
                ("gradients", "expected_gradients"),
                ("whole_parameters", "expected_parameters"),
            )
        ]
        print(f"{row['stage']:>5} " + " ".join(f"{c:>20}" for c in cells) + f" {row['transient'] / p:10.3f}")
    worst = max(worst_deviation(rank) for rank in results)
    print(f"largest deviation on any rank: {worst:.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ranks": arguments.ranks, "rows": results, "worst": worst}, indent=1))


if __name__ == "__main__":
    main()
