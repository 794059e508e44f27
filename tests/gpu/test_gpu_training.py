"""On a CUDA GPU: the same losses as on the CPU, in every stage; bf16 and fp16 train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trainwright as tw
from small import batches, mean_loss, plain_loop, relative, transformer, with_values
from trainwright.generate import GenerationSettings
from trainwright.models import attention
from trainwright.models.transformer import Transformer, TransformerSettings

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


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_by_blocks_are_documents_by_mask(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TransformerSettings(
        vocab_size=64, dim=128, layers=2, heads=4, kv_heads=2, ffn_dim=128, head_dim=32, max_sequence_length=512
    )
    x, y = torch.randint(0, 64, (2, 4, 512), generator=torch.Generator().manual_seed(0)).unbind()
    ids = (torch.rand(4, 512, generator=torch.Generator().manual_seed(1)) < 1 / 60).cumsum(1)

    def losses() -> list[float]:
        engine = tw.initialize(
            model=lambda: Transformer(settings), config={"precision": "bf16", "compile": compiled, "zero": 2}
        )
        found = [engine.train_batch({"input_ids": x, "labels": y, "document_ids": ids}) for _ in range(5)]
        engine.close()
        return found

    found = losses()
    assert list(attention._served.values()) == [True]
    monkeypatch.setattr(attention, "_blocks_serve", lambda *_: False)
    assert found == pytest.approx(losses(), rel=1e-2)


def test_three_calls() -> None:
    engine = tw.initialize(model=transformer, config={"precision": "bf16"})
    x, y = batches(1)[0]
    engine.backward(mean_loss(engine(x, labels=y)))
    assert engine.step() is not None
    engine.close()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_trains_like_bf16(recipe: str) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products on this GPU")
    settings = TransformerSettings(vocab_size=64, dim=64, layers=2, heads=2, kv_heads=2, ffn_dim=128, head_dim=32)
    losses = {}
    for float8 in ("none", recipe):
        config = {"precision": {"dtype": "bf16", "float8": float8}, "zero": 3, "optimizer": {"lr": 1e-2}}
        engine = tw.initialize(model=lambda: Transformer(settings), config=config)
        tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
        losses[float8] = [engine.train_batch({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}) for _ in range(8)]
        engine.close()
    assert losses[recipe] == pytest.approx(losses["none"], rel=5e-2)


def test_compiled_by_default_equals_eager() -> None:
    assert _losses() == pytest.approx(_losses(compile=False), rel=1e-4)


def test_states_on_the_disk_equal_those_on_the_device(tmp_path: Path) -> None:
    on_disk = {"optimizer": "disk", "path": str(tmp_path)}
    assert _losses(offload=on_disk, zero=3) == pytest.approx(_losses(zero=3), rel=1e-5)
    found = _losses(precision="bf16", offload={**on_disk, "masters": "disk"}, zero=3)
    assert found == pytest.approx(_losses(precision="bf16", zero=3), rel=3e-2)


GRAPHS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "bf16", "batch": {"accumulation": 3}},
    {"precision": "bf16", "compile": False, "recompute": "full"},
    {"precision": "fp16", "compile": False},
]


@pytest.mark.parametrize("config", GRAPHS, ids=lambda config: "-".join(map(str, config.values())))
def test_replayed_graphs_are_the_steps_themselves(config: dict[str, Any]) -> None:
    """Dropout's masks too, which follow the step and the sample."""
    found = {}
    for graphs in (False, True):
        given = {"gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}, "fused": {"cuda_graphs": graphs}} | config
        engine = tw.initialize(model=lambda: transformer(dropout=0.1), config=given)
        found[graphs] = [engine.train_batch({"input_ids": x, "labels": y}) for x, y in batches(9)]
        held = engine.parts.captured
        assert (held is not None and held.replays) == (graphs and 6)
        engine.close()
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_a_graph_reads_the_tables_that_are_there() -> None:
    """Generation makes longer rotary tables between two replays."""
    found = {}
    for graphs in (False, True):
        engine = tw.initialize(model=transformer, config={"fused": {"cuda_graphs": graphs}, "optimizer": {"lr": 1e-2}})
        losses = []
        for number, (x, y) in enumerate(batches(12)):
            losses.append(engine.train_batch({"input_ids": x, "labels": y}))
            if number == 6:
                engine.generate([[1, 2, 3]], GenerationSettings(max_new_tokens=80))
                torch.full((4096,), float("nan"), device="cuda")  # where the old ones were, perhaps
        found[graphs] = losses
        engine.close()
    assert found[True] == pytest.approx(found[False], rel=1e-5)


class Reads(torch.nn.Module):
    """Looks at a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.table(input_ids)
        assert logits.abs().max().item() < 1e9
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_model_that_reads_on_the_host_trains_without_a_graph() -> None:
    engine = tw.initialize(model=Reads, config={"fused": {"cuda_graphs": True}, "compile": False})
    with pytest.warns(UserWarning, match=r"the host waits for the GPU at .*test_gpu_training\.py"):
        assert all(engine.train_batch({"input_ids": x, "labels": y}) for x, y in batches(6))
    engine.close()
    torch.cuda.empty_cache()  # fails where a capture was left half done
