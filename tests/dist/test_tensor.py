"""Tensor and sequence parallelism against the unsharded loop, in float64: our models and Hugging Face's."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainwright as tw
from ranks import run_ranks
from small import VOCAB, batches, mean_loss, plain_loop, relative, share, transformer, with_values
from trainwright.data.batch import Batch
from trainwright.errors import ModelError
from trainwright.generate import GenerationSettings
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.pretrained import build_causal
from trainwright.verification.lift import Float64

STEPS = 3
CONFIG = {"precision": "fp64", "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}}
HF_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _huggingface(kind: str, **changes: Any) -> nn.Module:
    import transformers

    if kind == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": VOCAB, "pad_token_id": 0}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=16, **off)
        )
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    }[kind]
    return model_class(config_class(**(HF_SIZES | changes)))


GPT2_PLAN = {
    "transformer.wte": "embedding_rowwise",
    "transformer.h.*.attn.c_attn": "colwise_gather_output",
    "transformer.h.*.attn.c_proj": "rowwise_split_input",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}


def build(kind: str) -> nn.Module:
    """The models of this file by name; options after a colon."""
    kind, _, options = kind.partition(":")
    changes: dict[str, Any] = dict(eval(f"dict({options})"))
    if kind == "transformer":
        return transformer(**changes)
    if kind == "lstm":
        sizes = {"vocab_size": VOCAB, "embedding_dim": 12, "hidden_dim": 12, "layers": 2}
        return LstmLanguageModel(LstmSettings(**(sizes | changes)))
    if kind == "pre_shifted":
        import transformers

        return build_causal(transformers.LlamaConfig(**(HF_SIZES | changes), architectures=["LlamaForCausalLM"]))
    return _huggingface(kind, **changes)


def _ours(kind: str) -> bool:
    return kind.startswith(("transformer", "lstm"))


def _lifted(kind: str) -> Any:
    return contextlib.nullcontext() if _ours(kind) else Float64()


Case = tuple[str, int, int, int, str, dict[str, Any]]
"""(kind, tensor, stage, accumulation, style, config on top)"""


def _engine(case: Case, **arguments: Any) -> Any:
    kind, tensor, stage, accumulation, _, extra = case
    config = CONFIG | {"zero": stage, "batch": {"accumulation": accumulation}} | extra
    config["parallel"] = {"tensor": tensor} | extra.get("parallel", {})
    if kind == "gpt2":
        arguments["tensor_plan"] = GPT2_PLAN
    arguments.setdefault("model", lambda: build(kind))
    return tw.initialize(config=config, **arguments)


def _train(case: Case) -> Any:
    kind, _, _, accumulation, style, _ = case
    length = 5 if style == "odd" else 6
    # A model that comes with values: every rank has them.
    engine = _engine(case, **({"model": with_values(lambda: build(kind))} if style == "values" else {}))
    initial = engine.full_state_dict()
    shares = engine.parts.mesh.data_parallel_size
    place = engine.parts.mesh.data_parallel_rank
    losses, norms = [], []
    with _lifted(kind):
        for step, (tokens, labels) in enumerate(batches(STEPS, length=length)):
            x, y = share(tokens, place, shares), share(labels, place, shares)
            if style == "samples":
                rows = len(x)
                ids = torch.arange(rows) + step * len(tokens) + place * rows
                losses.append(engine.train_batch(Batch(x, y, None, ids, 0)))
            elif style == "logits":  # the user's own loss, on whole logits
                for a, b in zip(x.tensor_split(accumulation), y.tensor_split(accumulation), strict=True):
                    loss = tw.losses.cross_entropy(engine(a).logits, b)
                    engine.backward(loss, tokens=int((b != -100).sum()))
                    engine.step()
                losses.append(engine.last_step.loss)
            elif style == "plain":
                for a, b in zip(x.tensor_split(accumulation), y.tensor_split(accumulation), strict=True):
                    mean_loss(engine(input_ids=a, labels=b)).backward()
                engine.step()
            else:
                losses.append(engine.train_batch({"input_ids": x, "labels": y}))
            norms.append(engine.grad_norm)
    state = engine.full_state_dict()
    engine.close()
    return initial, losses, norms, state


def _expected(kind: str, length: int) -> tuple[dict[str, Any], Any]:
    model = with_values(lambda: build(kind)).double()
    initial = {name: t.clone() for name, t in model.state_dict().items()}
    with _lifted(kind):
        return initial, plain_loop(model, batches(STEPS, length=length))


def _compare(cases: list[Case], results: list[Any]) -> None:
    references: dict[Any, Any] = {}
    for case, (initial, losses, norms, state) in zip(cases, results, strict=True):
        length = 5 if case[4] == "odd" else 6
        key = (case[0], length)
        if key not in references:
            references[key] = _expected(*key)
        first, reference = references[key]
        _equal(case, initial, first, 0.0)
        for found, wanted in zip(losses, reference[0], strict=bool(losses)):
            assert relative(found, wanted) < 1e-9, f"{case}: loss {found} for {wanted}"
        for found, wanted in zip(norms, reference[1], strict=True):
            assert relative(found, wanted) < 1e-8, f"{case}: norm {found} for {wanted}"
        _equal(case, state, reference[2], 1e-8)


def _equal(case: Any, state: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert state.keys() == expected.keys(), case
    for name, tensor in expected.items():
        error = ((state[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-4)).item()
        assert error <= tolerance, f"{case}: {name} {error:.2g}"


def _transformers() -> list[Case]:
    untied, apart = "transformer:tied=False,qk_norm=True,vocab_size=38", {"parallel": {"sequence": False}}
    return [
        ("transformer", 2, 0, 3, "batch", {}),
        ("transformer", 2, 1, 1, "odd", {}),
        ("transformer", 2, 2, 3, "plain", {"recompute": "selective"}),
        ("transformer", 2, 3, 3, "values", {"recompute": "full"}),
        ("transformer", 2, 3, 1, "batch", {"offload": {"parameters": "cpu"}}),
        (untied, 2, 0, 1, "plain", apart),
        (untied, 2, 1, 3, "batch", {}),
        (untied, 2, 2, 1, "batch", {"parallel": {"replicate": 2}}),
        (untied, 2, 3, 3, "odd", apart),
        ("transformer:kv_heads=4,qk_norm=True", 4, 0, 1, "odd", {}),
        ("transformer", 2, 2, 3, "logits", {}),
        ("lstm", 2, 0, 1, "batch", {}),
        ("lstm:tied=True", 2, 3, 3, "plain", {}),
    ]  # fmt: skip


DROPS = "transformer:dropout=0.2,tied=False"
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


def _samples(step: int, place: int, shares: int) -> Batch:
    tokens, labels = batches(step + 1)[step]
    ids = torch.arange(len(tokens)) + step * len(tokens)
    return Batch(*(share(t, place, shares) for t in (tokens, labels)), None, share(ids, place, shares), 0)


def _live(rank: int, folder: Path, tensor: int, extra: dict[str, Any]) -> dict[str, Any]:
    """A run with dropout that starts from another layout's checkpoint, saves its own, evaluates and generates."""
    engine = _engine((DROPS, tensor, 2, 2, "samples", {"optimizer": {"lr": 1e-3}} | extra))
    mesh = engine.parts.mesh
    shares, place = mesh.data_parallel_size, mesh.data_parallel_rank
    losses = [engine.train_batch(_samples(step, place, shares)) for step in range(2)]
    engine.save(folder / f"tensor{tensor}")
    losses += [engine.train_batch(_samples(step, place, shares)) for step in range(2, 4)]
    found: dict[str, Any] = {"losses": losses, "loss": engine.evaluate([_samples(5, place, shares)]).loss}
    if tensor == 2:
        engine.load(folder / "tensor1")
        found["resumed"] = [engine.train_batch(_samples(step, place, shares)) for step in range(2, 4)]
    for cached in (True, False):
        settings = GenerationSettings(max_new_tokens=5, temperature=0.0, use_cache=cached)
        found[f"tokens {cached}"] = engine.generate(PROMPTS, settings)
    engine.eval()
    with torch.no_grad():
        tokens, labels = batches(1, length=5)[0]
        output = engine(tokens, labels=labels, return_logits=True)
    found["logits"] = output.logits.clone()
    engine.close()
    return found


def _refusal(kind: str, tensor: int, **arguments: Any) -> str:
    try:
        _engine((kind, tensor, 0, 1, "", {}), **arguments)
    except ModelError as error:
        return str(error)
    return "taken"


def _refusals(rank: int, huggingface: bool) -> dict[str, str]:
    found = {} if not huggingface else {
        "no table": _refusal("gpt2:n_layer=1", 2),
        "style": _refusal("mixtral", 2),
        "hf heads": _refusal("llama", 4),
    }  # fmt: skip
    return found | {
        "kv heads": _refusal("transformer", 4),
        "width": _refusal("transformer:kv_heads=4,ffn_dim=42", 4),
        "pattern": _refusal("transformer", 2, tensor_plan={"blocks.*.nothing": "colwise"}),
        "user style": _refusal("transformer", 2, tensor_plan={"blocks.*.ffn.up": "diagonal"}),
        "module": _refusal("transformer", 2, tensor_plan={"blocks.*.ffn_norm": "colwise"}),
    }


HUGGINGFACE: list[Case] = [
    ("llama", 2, 0, 1, "batch", {}),
    ("qwen3:tie_word_embeddings=True,vocab_size=38", 2, 2, 3, "plain", {"recompute": "full"}),
    ("pre_shifted", 2, 3, 1, "odd", {}),
    ("phi3:num_key_value_heads=4", 2, 2, 1, "values", {}),
    ("gpt2", 2, 3, 3, "batch", {}),
]
HALVES: list[Case] = [
    ("transformer", 2, 2, 1, "batch", {"precision": "bf16"}),
    ("transformer:tied=False", 2, 3, 1, "batch", {"precision": "bf16", "keep_fp32": ["head", "norm"]}),
    ("transformer", 2, 3, 1, "batch", {"precision": "fp16"}),
]


def _all(rank: int, folder: Path, huggingface: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "ours": [_train(case) for case in _transformers()],
        "huggingface": [_train(case) for case in HUGGINGFACE] if huggingface else [],
        "halves": [_train(case)[1] for case in HALVES],
        "live": _live(rank, folder, 2, {}),
        "refusals": _refusals(rank, huggingface),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """(a run on one rank, its and the ranks' checkpoints, what each of 4 ranks found): one start of ranks for all."""
    folder = tmp_path_factory.mktemp("tensor")
    alone = _live(0, folder, 1, {})
    return alone, folder, run_ranks(_all, 4, folder, importlib.util.find_spec("transformers") is not None)


def test_tensor_ranks_train_what_one_process_does(runs: Any) -> None:
    _compare(_transformers(), runs[2][0]["ours"])


def test_huggingface_models_by_their_tables(runs: Any) -> None:
    pytest.importorskip("transformers")
    _compare(HUGGINGFACE, runs[2][0]["huggingface"])


def test_half_precision_follows_the_fp32_run(runs: Any) -> None:
    for case, values in zip(HALVES, runs[2][0]["halves"], strict=True):
        reference = plain_loop(with_values(lambda kind=case[0]: build(kind)), batches(STEPS))[0]
        tolerance = {"bf16": 2e-2, "fp16": 3e-3}[case[5]["precision"]]
        assert values == pytest.approx(reference, rel=tolerance), case


def test_dropout_and_checkpoints_do_not_depend_on_the_layout(runs: Any) -> None:
    alone, folder, ranks = runs
    found = ranks[0]["live"]
    for name in ("losses", "loss"):
        assert found[name] == pytest.approx(alone[name], rel=1e-9), name
    assert found["resumed"] == pytest.approx(alone["losses"][2:], rel=1e-9)
    engine = _engine((DROPS, 1, 2, 2, "samples", {"optimizer": {"lr": 1e-3}}))
    engine.load(folder / "tensor2")
    resumed = [engine.train_batch(_samples(step, 0, 1)) for step in range(2, 4)]
    engine.close()
    assert resumed == pytest.approx(alone["losses"][2:], rel=1e-9)


def test_logits_and_generation_are_whole_on_every_rank(runs: Any) -> None:
    alone, _, ranks = runs
    for found in ranks:
        torch.testing.assert_close(found["live"]["logits"], alone["logits"], rtol=1e-9, atol=1e-9)
        for key in ("tokens True", "tokens False"):
            assert found["live"][key] == alone[key], key


def test_what_cannot_be_cut_is_refused_by_name(runs: Any) -> None:
    found = runs[2][0]["refusals"]
    wanted = {
        "kv heads": ("blocks.0.attention", "2 kv_heads", "parallel.tensor=2"),
        "width": ("blocks.0.ffn", "42", "parallel.tensor=3"),
        "no table": ("GPT2LMHeadModel", "tensor_plan="),
        "style": ("mlp.experts", "Mixtral", "parallel.tensor=1"),
        "hf heads": ("model.layers.0.self_attn", "2 kv_heads", "parallel.tensor=2"),
        "pattern": ("blocks.*.nothing", "Transformer"),
        "user style": ("'diagonal'", "blocks.0.ffn.up"),
        "module": ("blocks.0.ffn_norm", "RMSNorm"),
    }
    for name in found:
        for word in wanted[name]:
            assert word in found[name], f"{name}: {word!r} not in {found[name]}"
