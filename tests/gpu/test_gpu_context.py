"""Context parallelism on CUDA GPUs: torch's ring attention, and Ulysses over NCCL."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import trainwright as tw
from ranks import run_ranks
from small import batches, plain_loop, relative, transformer, with_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="context parallelism over NCCL needs two CUDA GPUs"),
]


def build() -> Any:
    return transformer(head_dim=8)


def _train(rank: int, method: str) -> list[float]:
    torch.distributed.destroy_process_group()  # of Gloo: the engine starts its own
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    config = {
        "precision": "bf16", "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2},
        "parallel": {"context": 2, "context_method": method},
    }  # fmt: skip
    engine = tw.initialize(model=build, config=config)
    found = [engine.train_batch({"input_ids": x, "labels": y}) for x, y in batches(6, length=7)]
    engine.close()
    return found


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_slices_train_as_whole_sequences_do(method: str) -> None:
    expected, _, _ = plain_loop(with_values(build), batches(6, length=7))
    for losses in run_ranks(_train, 2, method):
        assert max(relative(a, b) for a, b in zip(losses, expected, strict=True)) < 3e-2
