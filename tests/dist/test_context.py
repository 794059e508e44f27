"""Context parallelism against unsharded training, in float64: every ZeRO stage, accumulation, lengths and heads that do
not divide, documents, dropout, Hugging Face models, both forms of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trainwright as tw
from ranks import run_ranks
from small import batches, plain_loop, relative, share, transformer, with_values
from trainwright.data.batch import Batch
from trainwright.models.dropout import dropout_context
from trainwright.verification.cases import MODELS
from trainwright.verification.lift import Float64

STEPS = 3
ROWS = 12
CONFIG = {"precision": "fp64", "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}}
OURS: dict[str, dict[str, Any]] = {
    "base": {},
    "one_kv_head": {"kv_heads": 1},
    "untied": {"tied": False, "qk_norm": True, "heads": 8, "kv_heads": 4},
    "dropout": {"dropout": 0.2},
}


def build(kind: str) -> Any:
    if kind in OURS:
        return transformer(**OURS[kind])
    if kind == "sliding":
        import transformers

        return transformers.MistralForCausalLM(
            transformers.MistralConfig(
                vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=3, pad_token_id=0,
            )
        )  # fmt: skip
    return MODELS[kind]()


def extras(case: dict[str, Any], step: int, length: int) -> dict[str, Tensor]:
    """What beside tokens and labels a forward of the whole global batch is given: [ROWS, length] each."""
    starts = torch.rand(ROWS, length, generator=torch.Generator().manual_seed(step)) < 0.3
    starts[:, 0] = False
    kind = case.get("extra")
    if kind == "documents":
        return {"document_ids": starts.cumsum(1)}
    if kind == "positions":  # Hugging Face's packed documents
        last = torch.where(starts, torch.arange(length), 0).cummax(1).values
        return {"position_ids": torch.arange(length) - last}
    if kind == "padding":
        visible = torch.arange(length) < torch.arange(ROWS)[:, None] % (length - 1) + 2
        return {"attention_mask": visible.long()}
    return {}


def labels_of(labels: Tensor, more: dict[str, Tensor]) -> Tensor:
    mask = more.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, -100)


def options(case: dict[str, Any]) -> dict[str, Any]:
    return {"use_cache": False} if case.get("extra") == "positions" else {}


def train(rank: int, case: dict[str, Any]) -> Any:
    accumulation, length = case.get("accumulation", 1), case.get("length", 6)
    config = CONFIG | {
        "zero": case.get("zero", 1), "parallel": case["parallel"], "batch": {"accumulation": accumulation},
        "recompute": case.get("recompute", "none"),
    }  # fmt: skip
    engine = tw.initialize(model=lambda: build(case["kind"]), config=config)
    replica, replicas = engine.parts.mesh.data_parallel_rank, engine.parts.mesh.data_parallel_size
    losses, norms = [], []
    for step, (tokens, labels) in enumerate(batches(STEPS, rows=ROWS, length=length)):
        more = extras(case, step, length)
        whole = {"input_ids": tokens, "labels": labels_of(labels, more), **more}
        mine = {name: share(t, replica, replicas) for name, t in whole.items()}
        if case.get("extra") == "samples":
            samples = share(torch.arange(ROWS) + 100 * step, replica, replicas)
            losses.append(engine.train_batch(Batch(mine["input_ids"], mine["labels"], None, samples, 0)))
        elif case.get("calls") == "three":
            for part in range(accumulation):
                cut = {name: t.tensor_split(accumulation)[part] for name, t in mine.items()}
                engine.backward(engine(cut.pop("input_ids"), **cut, **options(case)).loss)
                engine.step()
            losses.append(engine.last_step.loss)
        else:
            losses.append(engine.train_batch(mine | options(case)))
        norms.append(engine.grad_norm)
    evaluation = engine.evaluate([mine | options(case)])
    state = engine.full_state_dict()
    engine.close()
    return losses, norms, state, (evaluation.loss, evaluation.tokens)


def train_all(rank: int, cases: list[Any]) -> list[Any]:
    results = []
    for case in cases:
        with Float64():
            results.append(train(rank, case))
    return results


def reference(case: dict[str, Any]) -> Any:
    """The same steps in one process on the whole batch."""
    length = case.get("length", 6)
    with Float64():  # rotary tables too are made as the ranks make them
        model: Any = with_values(lambda: build(case["kind"])).double()
    plain, step = model.forward, iter(range(STEPS))

    def forward(tokens: Tensor, labels: Tensor) -> Any:
        index = next(step)
        more = extras(case, index, length)
        with dropout_context(0, index, torch.arange(ROWS) + 100 * index):
            return plain(tokens, labels=labels_of(labels, more), **more, **options(case))

    model.forward = forward
    with Float64():
        return plain_loop(model, batches(STEPS, rows=ROWS, length=length))


TWO: list[dict[str, Any]] = [
    {"kind": "base", "zero": 0, "accumulation": 3, "length": 7},
    {"kind": "base", "zero": 1, "calls": "three"},
    {"kind": "base", "zero": 1, "accumulation": 3, "length": 5, "calls": "three"},
    {"kind": "base", "zero": 2, "accumulation": 3},
    {"kind": "one_kv_head", "zero": 3, "length": 7, "calls": "three"},
    {"kind": "untied", "zero": 2, "accumulation": 3, "calls": "three"},
    {"kind": "dropout", "zero": 2, "accumulation": 3, "length": 7, "extra": "samples"},
    {"kind": "dropout", "zero": 3, "extra": "samples", "recompute": "full"},
    {"kind": "base", "length": 7, "extra": "documents"},
    {"kind": "base", "accumulation": 3, "extra": "documents", "calls": "three", "recompute": "selective"},
    {"kind": "llama", "zero": 3, "length": 7, "calls": "three", "accumulation": 3},
    {"kind": "llama", "length": 7, "extra": "positions", "recompute": "full", "accumulation": 3},
    {"kind": "llama", "extra": "padding", "calls": "three"},
    {"kind": "sliding", "length": 7},
    {"kind": "gpt2", "zero": 0, "length": 15},
    {"kind": "gpt2", "zero": 2, "calls": "three", "recompute": "selective"},
    {"kind": "bert", "zero": 2, "length": 7, "accumulation": 3},
    {"kind": "bert", "extra": "padding", "calls": "three"},
]
FOUR: list[dict[str, Any]] = [
    {"kind": "base", "parallel": {"context": 4}, "zero": 2, "accumulation": 3, "length": 6},
    {"kind": "untied", "parallel": {"context": 4}, "zero": 3, "length": 9, "calls": "three"},
    {"kind": "base", "zero": 0, "length": 7, "accumulation": 3},
    {"kind": "base", "zero": 1, "length": 7, "accumulation": 3, "calls": "three"},
    {"kind": "base", "zero": 3, "accumulation": 3, "extra": "documents"},
    {"kind": "dropout", "parallel": {"context": 2, "replicate": 2}, "zero": 2, "length": 7, "extra": "samples"},
    {"kind": "dropout", "parallel": {"context": 2, "tensor": 2}, "zero": 3, "length": 7, "extra": "samples"},
    {"kind": "llama", "parallel": {"context": 2, "tensor": 2}, "zero": 2, "length": 7, "recompute": "full"},
    {"kind": "base", "parallel": {"context": 2, "pipeline": 2}, "zero": 2, "accumulation": 3, "extra": "documents"},
    {"kind": "llama", "parallel": {"context": 2, "pipeline": 2}, "zero": 1, "accumulation": 3, "length": 7},
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_sequences_train_as_whole_ones_do(ranks: int) -> None:
    cases = [{"parallel": {"context": 2}} | case for case in {2: TWO, 4: FOUR}[ranks]]
    results = run_ranks(train_all, ranks, cases)
    for case, found, others in zip(cases, results[0], zip(*results[1:], strict=True), strict=True):
        losses, norms, state, evaluation = found
        expected = reference(case)
        worst = max(relative(a, b) for a, b in zip(losses, expected[0], strict=True))
        assert worst < 1e-9, f"{case}: loss {worst:.2g}"
        assert relative(norms[0], expected[1][0]) < 1e-9, f"{case}: norm {norms[0]} for {expected[1][0]}"
        for name, tensor in expected[2].items():
            whole = tensor.double()
            error = ((state[name].double() - whole).norm() / whole.norm().clamp(min=1e-4)).item()
            assert error < 1e-8, f"{case}: {name} {error:.2g}"
        for other in others:
            assert other[0] == losses, f"{case}: the ranks do not agree on the loss"
            assert other[3] == evaluation, f"{case}: the ranks do not agree on the evaluation"
