"""One rank alone, whose parameters stay plain, against the same rank under FSDP2: bit for bit the same training."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Awkward, batches, transformer
from torch import Tensor, nn

import trainwright as tw
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.parallel.one_rank import OneRank

MODELS: dict[str, Any] = {
    "transformer": lambda: transformer(dropout=0.1),
    "untied": lambda: transformer(dropout=0.1, tied=False),
    "llama": lambda: _llama(),
    "awkward": Awkward,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {"precision": "fp32"}),
    ("transformer", {"precision": "bf16", "batch": {"accumulation": 3}}),
    ("transformer", {"precision": "fp16", "zero": 0}),
    ("transformer", {"precision": "bf16", "keep_fp32": ["blocks.1.ffn", "norm"], "zero": 1}),
    ("untied", {"precision": "bf16", "keep_fp32": ["head"], "recompute": "full"}),
    ("untied", {"precision": "fp16", "keep_fp32": ["head"]}),
    ("llama", {"precision": "bf16", "batch": {"accumulation": 2}}),
    ("transformer", {"precision": "bf16", "compile": True}),
    ("transformer", {"precision": "bf16", "compile": True, "recompute": "selective"}),
    ("transformer", {"precision": "bf16", "recompute": "selective", "batch": {"accumulation": 2}}),
    ("transformer", {"precision": "bf16", "fused": {"optimizer_in_backward": True, "clipping": "late"}, "gradient_clipping": 1.0}),
    ("transformer", {"precision": "bf16", "freeze": ["embedding.*"], "ema": 0.9}),
    ("awkward", {"precision": "fp64", "batch": {"accumulation": 2}}),
    ("awkward", {"precision": "bf16", "batch": {"accumulation": 2}}),
]


def _llama() -> nn.Module:
    """Hugging Face's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, use_cache=False
        )
    )


def _train(case: tuple[str, dict[str, Any]]) -> tuple[list[float], dict[str, Tensor]]:
    model, config = case
    engine = tw.initialize(model=MODELS[model], config=config | {"gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}})
    losses = []
    for number, (tokens, labels) in enumerate(batches(4)):
        losses.append(engine.train_batch({"input_ids": tokens, "labels": labels}))
        if number == 1:
            with torch.no_grad():
                engine(tokens, labels=labels)
    weights = engine.full_state_dict()
    engine.close()
    return losses, weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing the compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[1].values()))}")
def test_it_trains_as_fsdp_does(case: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights = _train(case)
    monkeypatch.setattr("trainwright.parallel.apply.alone", lambda *_: False)
    expected, expected_weights = _train(case)
    assert losses == expected
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def test_outside_of_forward_and_backward_parameters_are_the_masters() -> None:
    engine = tw.initialize(model=transformer, config={"precision": "bf16", "recompute": "full"})
    tokens, labels = batches(1)[0]
    held = dict(engine.module.named_parameters())

    def masters() -> bool:
        now = dict(engine.module.named_parameters())
        return now.keys() == held.keys() and all(now[name] is held[name] for name in held)

    loss = engine(tokens, labels=labels).loss
    assert not masters(), "forward runs on copies"
    engine.backward(loss)
    assert masters()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in held.values())  # noqa: PT018
    engine.step()
    with torch.no_grad():
        first = engine(tokens, return_logits=True).logits
        assert all(v.dtype == torch.float32 for v in engine.module.state_dict().values())
        assert masters()
        held["norm.weight"].mul_(2.0)  # noticed though no step has been made
        assert not torch.allclose(engine(tokens, return_logits=True).logits, first)
    engine.evaluate([{"input_ids": tokens, "labels": labels}])
    assert masters()
    with torch.inference_mode():
        engine(tokens)
    engine.train_batch({"input_ids": tokens, "labels": labels})
    engine.close()


def test_a_backward_finds_the_copies_whatever_comes_before_it(tmp_path: Path) -> None:
    """Recomputed forwards look for them: after another forward's backward, and after evaluation."""
    tokens, labels = batches(1)[0]
    halves = [{"input_ids": tokens[rows], "labels": labels[rows]} for rows in (slice(0, 6), slice(6, 12))]
    config = {"precision": "bf16", "recompute": "full", "batch": {"accumulation": 2}}
    engine = tw.initialize(model=transformer, config=config)
    losses = [engine(**half).loss for half in halves]
    engine.evaluate([halves[0]])
    for loss in losses:
        engine.backward(loss)
    engine.step()
    expected = engine.full_state_dict()
    engine.save(tmp_path / "saved")
    engine.close()
    engine = tw.initialize(model=transformer, config=config)
    engine.train_batch({"input_ids": tokens, "labels": labels})
    assert all(torch.allclose(engine.full_state_dict()[name], value, atol=1e-4) for name, value in expected.items())
    loss = engine(**halves[0]).loss  # whose backward never comes
    engine.load(tmp_path / "saved")
    del loss
    assert all(torch.equal(engine.full_state_dict()[name], value) for name, value in expected.items())
    engine.close()


def test_a_forward_without_backward_holds_nothing() -> None:
    engine = tw.initialize(model=transformer, config={"precision": "bf16"})
    weight = weakref.ref(engine.module.norm.weight)
    engine(batches(1)[0][0])
    engine.close()
    del engine
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize(
    ("model", "further"),
    [("transformer", {}), ("llama", {}), ("transformer", {"recompute": "full"}), ("transformer", {"compile": True})],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, of its compiler
def test_a_copy_is_a_model_of_its_own(model: str, further: dict[str, Any]) -> None:
    """Plain, in the masters' format, and it stays as it was while training goes on."""
    config = {"precision": "bf16", "keep_fp32": ["*norm"]} | further
    engine = tw.initialize(model=MODELS[model], config=config)
    tokens, labels = batches(1)[0]
    engine.train_batch({"input_ids": tokens, "labels": labels})
    with torch.no_grad():
        engine(tokens)
    copied = copy.deepcopy(engine.module)
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in copied.parameters())
    if further:  # what recomputes and what is compiled runs with gradients
        copied.zero_grad()
        copied(tokens, labels=labels).loss.backward()
        assert all(p.grad is not None for p in copied.parameters())
    copied.eval()
    plain = MODELS[model]().eval()
    plain.load_state_dict(engine.full_state_dict())
    words = {} if model == "llama" else {"return_logits": True}
    engine.train_batch({"input_ids": tokens, "labels": labels})
    with torch.no_grad():
        found, expected = copied(tokens, **words).logits, plain(tokens, **words).logits
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    engine.close()


def test_who_is_alone() -> None:
    lstm = LstmLanguageModel(LstmSettings(37, embedding_dim=12, hidden_dim=12, layers=2))
    kahan = {"precision": {"dtype": "bf16", "master": "bf16_kahan"}}
    for model, config, plain in (
        (transformer, {"zero": 2}, True), (transformer, {"zero": 3}, False), (transformer, kahan, False), (lstm, {}, False),
    ):  # fmt: skip
        engine = tw.initialize(model=model, config=config)
        assert isinstance(engine.parts.model._flags, OneRank) == plain, config
        assert (type(next(engine.module.parameters())) is nn.Parameter) == plain
        engine.close()
