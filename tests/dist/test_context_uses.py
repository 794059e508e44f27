"""Context parallelism beside training: logits, generation, a loss of the user's own; attention alone; what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainwright as tw
from trainwright.verification.cases import MODELS
from trainwright.verification.lift import Float64
from ranks import run_ranks
from small import VOCAB, Awkward, batches, transformer
from trainwright.errors import TrainwrightError
from trainwright.generate import GenerationSettings
from trainwright.models.attention import attend
from trainwright.parallel.context.ring import Ring
from trainwright.parallel.context.ulysses import Ulysses

# Steps that change nothing, so that two of them see the same weights.
CONFIG = {
    "precision": "fp64",
    "optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0},
    "parallel": {"context": 2},
}


def _build(kind: str) -> nn.Module:
    if kind == "awkward":
        return Awkward()
    if kind == "three_heads":
        return transformer(heads=3, kv_heads=3, head_dim=8)
    if kind == "router":
        model = MODELS["llama"]()
        model.config.output_router_logits = True
        return model
    if kind == "own_attention":
        model = MODELS["llama"]()
        model.__class__ = type("OwnAttention", (type(model),), {"_supports_attention_backend": False})
        return model
    return transformer() if kind == "ours" else MODELS[kind]()


def _uses(rank: int, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tokens, labels = batches(1, rows=4, length=7)[0]
    with Float64():
        engine = tw.initialize(model=lambda: _build(kind), config=CONFIG)
        with torch.no_grad():
            whole = engine.module(tokens).logits  # not through the engine: whole sequences on every rank
            sliced = engine(tokens).logits
        found["logits"] = (sliced.shape == whole.shape, (sliced - whole).abs().max().item())
        settings = GenerationSettings(max_new_tokens=4, temperature=0.0)
        found["generated"] = engine.generate(tokens[:, :3].tolist(), settings)
        found["last"] = whole[:, 2].argmax(-1).tolist()
        norms = []
        for own in (False, True):
            output = engine(tokens) if own else engine(tokens, labels=labels)
            if own:  # the user's own loss on the whole logits
                shift = 0 if kind == "ours" else 1
                targets = labels[:, shift:]
                loss = F.cross_entropy(output.logits[:, : 7 - shift].flatten(0, 1), targets.flatten())
                engine.backward(loss, tokens=int((targets != -100).sum()))
            else:
                found["without logits"] = output.logits is None
                output.loss.backward()
            engine.step()
            norms.append(engine.grad_norm)
        found["norms"] = norms
        engine.close()
    return found


def _attention_alone(rank: int) -> dict[str, float]:
    """Both kinds of exchange against attention over whole sequences: largest error of outputs and gradients."""
    group, ranks = torch.distributed.group.WORLD, torch.distributed.get_world_size()
    errors: dict[str, float] = {}
    for name, kv_heads, exchange in (
        ("ulysses", 4, Ulysses(group)),
        ("ulysses, heads copied", 1, Ulysses(group)),
        ("ring", 2, Ring(group)),  # with the CPU's kernel: the same steps as on a GPU
    ):
        generator = torch.Generator().manual_seed(3)
        draw = [torch.randn(2, heads, 8, 8, generator=generator) for heads in (4, kv_heads, kv_heads, 4)]
        whole = [t.clone().requires_grad_() for t in draw[:3]]
        mine = [t.chunk(ranks, dim=2)[rank].clone().requires_grad_() for t in draw[:3]]
        expected = attend(whole[0], whole[1], whole[2], None)
        found = exchange(attend)(mine[0], mine[1], mine[2], None)
        expected.backward(draw[3])
        found.backward(draw[3].chunk(ranks, dim=2)[rank])
        pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(mine, whole, strict=True))]
        errors[name] = max(_error(a, b.chunk(ranks, dim=2)[rank]) for a, b in pairs if a is not None and b is not None)
    return errors


def _error(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("three_heads", {}, "heads=3.*parallel.context=1"),
    ("t5", {}, "encoder-decoder"),
    ("lstm", {}, "LstmLanguageModel.*recurrent"),
    ("awkward", {}, "Awkward.*our Transformer and Hugging Face"),
    ("own_attention", {}, "own code"),
    ("router", {}, "not that of its tokens alone"),
    ("ours", {"context_method": "ring"}, "ring on cpu.*parallel.context_method=ulysses"),
    ("ours", {"context": 3}, "product divides"),
]


def _refusals(rank: int) -> list[str]:
    said = []
    for kind, parallel, _ in REFUSED:
        precision = "bf16" if "context_method" in parallel else "fp32"
        config = {"parallel": {"context": 2} | parallel, "precision": precision}
        try:
            tw.initialize(model=lambda kind=kind: _build(kind), config=config).close()
            said.append("accepted")
        except TrainwrightError as error:
            said.append(str(error))
    engine = tw.initialize(model=transformer, config={"parallel": {"context": 2}})
    tokens = torch.zeros(2, 6, dtype=torch.long)
    for inputs in ({"input_ids": tokens, "rows": torch.zeros(2)}, {"labels": None}):
        try:
            engine.train_batch(inputs)
        except (TrainwrightError, ValueError) as error:
            said.append(str(error))
    engine.close()
    return said


def _all(rank: int) -> dict[str, Any]:
    return {
        "attention": _attention_alone(rank),
        "refusals": _refusals(rank),
        **{kind: _uses(rank, kind) for kind in ("ours", "llama")},
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    pytest.importorskip("transformers")
    return run_ranks(_all, 2)


def test_attention_over_slices_is_attention_over_whole_sequences(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        for name, error in of_rank["attention"].items():
            assert error < 3e-6, f"{name}: {error:.2g}"


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_logits_generation_and_a_loss_of_ones_own(found: list[dict[str, Any]], kind: str) -> None:
    first, second = (copy.deepcopy(of_rank[kind]) for of_rank in found)
    assert first == second, "the ranks agree"
    same_shape, error = first["logits"]
    assert same_shape
    assert error < 1e-12
    assert first["without logits"], "with labels, the logits of a slice are not passed off as the whole"
    assert [row[0] for row in first["generated"]] == first["last"]
    assert all(0 <= token < VOCAB for row in first["generated"] for token in row)
    assert first["norms"][1] == pytest.approx(first["norms"][0], rel=1e-12)


def test_what_cannot_be_cut_is_refused(found: list[dict[str, Any]]) -> None:
    said = found[0]["refusals"]
    for (kind, _, pattern), text in zip(REFUSED, said, strict=False):
        assert re.search(pattern, text, flags=re.DOTALL), f"{kind}: {text}"
    assert "rows" in said[len(REFUSED)]
