"""What the engine itself costs: its step against the same torch calls by hand, same model, same fused loss, one process.

    python benchmarks/overhead.py [--vocab-size 8192] [--rows 8] [--steps 12]

Both live in one process and take turns; printed is the median of the paired ratios. fp32, so that by hand needs no casts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peer_loops import BETAS, CLIP, DECAY, LR, Shape, adamw
from peer_loops import _transformer as transformer

import trainwright as tw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    shape = Shape(given.vocab_size, given.rows, given.steps, "fp32")
    config = {
        "precision": "fp32", "gradient_clipping": CLIP, "optimizer": {"lr": LR, "betas": BETAS, "weight_decay": DECAY},
    }  # fmt: skip
    engine = tw.initialize(model=transformer(shape), config=config)
    model = transformer(shape)()
    optimizer = adamw(model.parameters())

    def by_hand(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    ratios = []
    for step in range(given.steps):
        batch, times = shape.batch(step, shifted=True), {}
        for train in (engine.train_batch, by_hand) if step % 2 else (by_hand, engine.train_batch):
            began = time.perf_counter()
            train(batch)
            times[train] = time.perf_counter() - began
        if step >= 2:
            ratios.append(times[engine.train_batch] / times[by_hand])
    tokens = given.rows * 256
    print(
        f"V={given.vocab_size:,}, {tokens:,} tokens a step: the engine's step takes {statistics.median(ratios):.3f} of that by hand"
    )
    engine.close()


if __name__ == "__main__":
    main()
