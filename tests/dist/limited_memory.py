"""Trains five steps under a limit on private memory: `python limited_memory.py CONFIG_JSON BYTES_A_PARAMETER`.

Beyond what the process has after its imports it may take BYTES_A_PARAMETER for each parameter (0: no limit). Prints the
losses as JSON. Private memory is what RLIMIT_DATA counts; pages of files are the kernel's to drop.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

import trainwright as tw
from trainwright.models.transformer import Transformer, TransformerSettings

# 12 equal blocks of the parameters.
SETTINGS = TransformerSettings(
    vocab_size=256, dim=512, layers=12, heads=8, kv_heads=8, ffn_dim=2048, head_dim=64, max_sequence_length=8
)


def private_bytes() -> int:
    """Private memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) << 10


def main() -> None:
    config, share = json.loads(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(SETTINGS).parameters())
    tw.initialize(model=lambda: torch.nn.Linear(2, 2)).close()  # the process group and its threads: imports, as it were
    (torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()
    if share:
        limit = private_bytes() + int(share * parameters)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    engine = tw.initialize(model=lambda: Transformer(SETTINGS), config=config)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(5):
        tokens = torch.randint(0, 256, (1, 9), generator=generator)
        losses.append(engine.train_batch({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}))
    print(json.dumps(losses))
    engine.close()


if __name__ == "__main__":
    main()
