"""On a CUDA GPU: the same losses as on the CPU, in every stage; bf16 and fp16 train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trainwright as tw
from small import batches, mean_loss, plain_loop, relative, transformer, with_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def _losses(**config: Any) -> list[float]:
    engine = tw.initialize(model=transformer, config={"gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}} | config)
    assert engine.device.type == "cuda"
    found = [engine.train_batch({"input_ids": x, "labels": y}) for x, y in batches(6)]
    engine.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp64_losses_are_the_cpus(stage: int) -> None:
    expected, _, _ = plain_loop(with_values(transformer).double(), batches(6))
    found = _losses(precision="fp64", zero=stage)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-9


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains(dtype: str) -> None:
    expected, _, _ = plain_loop(with_values(transformer), batches(6))
    found = _losses(precision=dtype, zero=2)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 3e-2


def test_offloaded_optimizer_equals_the_one_on_the_device() -> None:
    assert _losses(offload={"optimizer": "cpu"}) == pytest.approx(_losses(), rel=1e-5)


def test_three_calls() -> None:
    engine = tw.initialize(model=transformer, config={"precision": "bf16"})
    x, y = batches(1)[0]
    engine.backward(mean_loss(engine(x, labels=y)))
    assert engine.step() is not None
    engine.close()
