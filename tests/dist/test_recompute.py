"""Activation recomputation: what runs twice, what is kept, and that every strategy trains the same with it."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainwright as tw
from ranks import run_ranks
from small import VOCAB, batches, relative, transformer
from trainwright.config.schema import RecomputeConfig
from trainwright.parallel.recompute import apply_recompute

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Watch(TorchDispatchMode):
    """Counts operators, and the bytes of what they made that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return result

    def held_bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self._made.values() if reference() is not None)


def run(mode: str, every: int = 1, dtype: torch.dtype = torch.float32, layers: int = 4) -> Any:
    """(operators of forward and backward, bytes held in between, gradients) of one micro-batch."""
    torch.manual_seed(0)
    model = transformer(layers=layers, dropout=0.1, dim=32, heads=4, head_dim=8, ffn_dim=64).to(dtype)
    units: list[tuple[str, nn.Module]] = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    apply_recompute(units, RecomputeConfig(mode=mode, every=every))
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # dropout's keys
    with Watch() as watch:
        loss = model(tokens, labels=tokens).loss
        held = watch.held_bytes()
        forward = watch.counts.copy()
        loss.backward()
    assert sorted(dict(model.named_parameters())) == sorted(dict(transformer(layers=layers).named_parameters()))
    return forward, watch.counts - forward, held, [p.grad for p in model.parameters()]


def test_selective_runs_cheap_operators_alone_twice() -> None:
    forward, backward, held, gradients = run("none")
    products = 7 * 4  # q, k, v, out, gate, up, down of each block
    for mode, products_again, cheap_again in (("selective", 0, 4), ("full", products, 4)):
        forward_2, backward_2, held_2, gradients_2 = run(mode)
        assert forward_2["mm"] == forward["mm"], "the first forward is the same"
        again = {name: backward_2[name] - backward[name] for name in ("mm", "silu", ATTENTION)}
        assert again["mm"] == products_again, (mode, again)
        assert again["silu"] == cheap_again, (mode, again)
        assert again[ATTENTION] == (4 if mode == "full" else 0), (mode, again)
        assert held_2 < held, f"{mode} holds {held_2} bytes, without recomputation {held}"
        for a, b in zip(gradients, gradients_2, strict=True):
            assert torch.equal(a, b), mode
    assert run("full")[2] < run("selective")[2], "full keeps less than selective"


def test_every_second_block_recomputes_half() -> None:
    none, second, full = (run(*settings)[1] for settings in (("none",), ("full", 2), ("full",)))
    assert second["silu"] - none["silu"] == 2
    assert full["silu"] - none["silu"] == 4


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_products_widened_for_the_processor(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """bf16 where the processor has no such product: made in fp32 inside an operator of ours, whose bf16 result is kept."""
    monkeypatch.setattr("trainwright.fused.linear._cpu_lacks", lambda dtype: dtype == torch.bfloat16)
    _, plain, held, expected = run("none", dtype=torch.bfloat16)
    _, counts, held_now, found = run(mode, dtype=torch.bfloat16)
    again = {name: counts[name] - plain[name] for name in ("wide_linear", "wide_attention", "mm")}
    products, attentions = (0, 0) if mode == "selective" else (7 * 4, 4)
    assert again == {"wide_linear": products, "wide_attention": attentions, "mm": 0}
    assert held_now < held, f"{held_now} bytes held, without recomputation {held}"
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_evaluation_recomputes_nothing() -> None:
    model = transformer()
    apply_recompute([("blocks.0", model.blocks[0])], RecomputeConfig(mode="full"))
    tokens = torch.zeros(2, 5, dtype=torch.long)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    with torch.no_grad():
        assert not model(tokens).logits.requires_grad


CASES: list[dict[str, Any]] = [
    *({"zero": stage, "batch": {"accumulation": 3 if stage % 2 else 1}} for stage in (0, 1, 2, 3)),
    {"zero": 1, "parallel": {"replicate": 2}},
    {"zero": 2, "parallel": {"context": 2}},
    {"zero": 3, "parallel": {"tensor": 2}},
    {"zero": 2, "parallel": {"pipeline": 2}, "batch": {"accumulation": 3}},
]
MODES: list[Any] = ["none", "full", "selective", {"mode": "full", "every": 2}]


def train(rank: int, cases: list[Any]) -> list[Any]:
    found = []
    for case in cases:
        shared = {"precision": "fp64", "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}}
        for mode in MODES:
            engine = tw.initialize(model=lambda: transformer(dropout=0.1), config=shared | case | {"recompute": mode})
            mesh = engine.parts.mesh
            losses = []
            for tokens, labels in batches(3):
                mine = slice(mesh.data_parallel_rank, None, mesh.data_parallel_size)
                losses.append(engine.train_batch({"input_ids": tokens[mine], "labels": labels[mine]}))
            found.append((losses, engine.grad_norm))
            engine.close()
    return found


def test_every_strategy_trains_the_same_with_recomputation() -> None:
    results = run_ranks(train, 2, CASES)[0]
    for index, case in enumerate(CASES):
        of_case = results[index * len(MODES) : (index + 1) * len(MODES)]
        for mode, (losses, norm) in zip(MODES, of_case, strict=True):
            worst = max(relative(a, b) for a, b in zip(losses, of_case[0][0], strict=True))
            assert worst < 1e-12, f"{case} recompute={mode}: loss {worst:.2g}"
            assert relative(norm, of_case[0][1]) < 1e-11, f"{case} recompute={mode}"


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_attention_by_large_products(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """bf16 where the processor multiplies it fast, without tiles: an operator of ours whose result is kept."""
    monkeypatch.setattr("trainwright.fused.linear._cpu_lacks", lambda dtype: False)
    monkeypatch.setattr("trainwright.fused.product_attention.SERVES", True)
    monkeypatch.setattr("trainwright.fused.product_attention.SHORTEST", 1)
    forward, plain, _, expected = run("none", dtype=torch.bfloat16)
    _, counts, _, found = run(mode, dtype=torch.bfloat16)
    assert (forward["product_attention"], plain["product_attention_backward"]) == (4, 4)
    assert counts["product_attention"] == (0 if mode == "selective" else 4)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
