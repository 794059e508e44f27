"""The reference is plain training; the models and configs that `verify` makes of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from small import VOCAB, batches, plain_loop, transformer, with_values
from trainwright.config import load_config
from trainwright.data.batch import Batch
from trainwright.errors import ConfigError
from trainwright.models.build import build
from trainwright.optim.schedules import build_schedule
from trainwright.verification.cases import MODELS, cases
from trainwright.verification.data import GivenBatches
from trainwright.verification.lift import Float64
from trainwright.verification.reference import Reference
from trainwright.verification.shrink import shrink_config, shrunk_huggingface
from trainwright.verification.source import has_dropout, source_of, without_dropout
from trainwright.verification.verify import in_format

STEPS = 4


def _reference(name: str = "adamw", keep: bool = False) -> Reference:
    config = load_config({"optimizer": {"name": name, "lr": 1e-2}, "gradient_clipping": 1.0}).config
    data = GivenBatches([Batch(x, y, None, torch.arange(len(x)), 0) for x, y in batches(STEPS)])
    schedule = build_schedule(config.lr_schedule, None)
    source = source_of(transformer, config.seed)
    return Reference(
        lambda: source.for_reference(config, torch.float64, torch.device("cpu")), config, schedule, data.whole, keep
    )


@pytest.mark.parametrize("keep", [False, True])
def test_the_reference_is_torchs_own_loop(keep: bool) -> None:
    losses, norms, state = plain_loop(with_values(transformer).double(), batches(STEPS))
    reference = _reference(keep=keep)
    found = [reference.result(step) for step in range(STEPS)]
    assert [step.loss for step in found] == pytest.approx(losses, rel=1e-12)
    assert [step.norm for step in found] == pytest.approx(norms, rel=1e-12)
    final = reference.final(STEPS)
    for name, value in final.items():
        torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-14)
    if keep:
        assert reference.result(1) is found[1]
        again = reference.at(2)  # made anew, with its steps
        assert not torch.equal(dict(again.named_parameters())["norm.weight"], final["norm.weight"])
        assert reference.final(STEPS) is final


def test_gradients_before_clipping_are_kept() -> None:
    found = _reference().result(0)
    total = sum(g.square().sum() for g in found.gradients.values())
    assert float(torch.as_tensor(total).sqrt()) == pytest.approx(found.norm, rel=1e-12)


def test_sign_based_optimizers_take_the_strategys_weights() -> None:
    reference = _reference("lion")
    assert reference.gradients_only
    first = reference.result(0)
    weights = {name: p.detach() * 1.01 for name, p in reference.module.named_parameters()}
    reference.load(1, weights)
    assert reference.result(1).loss != first.loss
    assert torch.equal(dict(reference.module.named_parameters())["norm.weight"], weights["norm.weight"])


def test_the_mode_lifts_casts() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with Float64():
        found = (
            x.float(),
            x.to(torch.float32),
            torch.softmax(x, 0, dtype=torch.float32),
            torch.zeros(1, dtype=torch.float32),
        )
    assert all(t.dtype == torch.float64 for t in found)
    assert x.float().dtype == torch.float32


def test_dropout_is_off_in_others_models_and_stays_in_ours() -> None:
    other = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
    assert has_dropout(other[1])
    assert not any(has_dropout(m) for m in without_dropout(other).modules())
    ours = without_dropout(transformer(dropout=0.1))
    assert ours.settings.dropout == 0.1


def test_a_module_is_copied_and_a_callable_that_needs_values_is_built_whole() -> None:
    module = nn.Linear(3, 3)
    source = source_of(module, 0)
    assert source.for_strategy() is not module

    def needs_values() -> nn.Module:
        built = nn.Linear(3, 3)
        assert float(built.weight.sum()) != 17.0
        return built

    whole = source_of(needs_values, 0)
    a, b = (dict(whole.for_strategy().named_parameters()) for _ in range(2))
    assert torch.equal(a["weight"], b["weight"])


def test_a_format_replaces_all_of_the_precision_section() -> None:
    resolved = load_config({"precision": {"dtype": "bf16", "reduce_dtype": "bf16"}, "keep_fp32": ["norm"]})
    exact = in_format(resolved, "fp64").config
    assert (exact.precision.dtype, exact.precision.reduce_dtype, exact.keep_fp32) == ("fp64", None, ())
    assert in_format(resolved, "bf16") is resolved
    assert in_format(load_config({"precision": "fp16"}), "fp16").config.precision.loss_scale == 1024.0
    own = load_config({"precision": {"dtype": "fp16", "loss_scale": 8.0}})
    assert in_format(own, "fp16").config.precision.loss_scale == 8.0


@pytest.mark.parametrize("words", ["model.preset=llama-8b", "model.preset=qwen3-8b", "model.preset=smollm2-135m"])
def test_presets_shrink_in_their_own_kind(words: str) -> None:
    big = load_config(None, [words, "parallel.tensor=2", "batch.global_size=512", "batch.accumulation=8"])
    small = shrink_config(big).config
    assert small.model is not None
    module = build(small.model)
    assert sum(p.numel() for p in module.parameters()) < 30_000_000
    assert small.data.sequence_length == 32
    assert small.batch.accumulation == 8
    settings = module.settings
    assert settings.heads % 2 == 0
    assert settings.kv_heads % 2 == 0
    assert settings.qk_norm == ("qwen" in words)


def test_lstms_and_hugging_face_configs_shrink(tmp_path: Path) -> None:
    lstm = shrink_config(load_config({"model": {"lstm": {"vocab_size": 100, "layers": 6}}})).config
    assert lstm.model is not None
    assert lstm.model.lstm is not None
    assert (lstm.model.lstm.layers, lstm.model.lstm.hidden_dim) == (2, 48)
    transformers = pytest.importorskip("transformers")
    transformers.Qwen3Config(
        vocab_size=VOCAB, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4
    ).save_pretrained(tmp_path)
    config = load_config({"model": {"huggingface": str(tmp_path)}}).config
    small = shrunk_huggingface(config)
    assert (small.num_hidden_layers, small.hidden_size, small.head_dim) == (2, 64, 16)
    assert small.num_key_value_heads in (2, 4)
    assert small.num_attention_heads % small.num_key_value_heads == 0
    with pytest.raises(ConfigError, match="shrink without a model"):
        shrink_config(load_config({}))


def test_the_matrix_is_what_the_documentation_says() -> None:
    found = cases()
    keys = [(c.model, tuple(sorted((k, str(v)) for k, v in c.changes.items()))) for c in found]
    assert len(set(keys)) == len(keys)
    on_four = [c for c in found if 4 % c.ranks == 0]
    assert len(on_four) >= 100
    assert any(c.ranks == 8 for c in found)
    assert {c.model for c in found} == set(MODELS)
    for axis in ("tensor", "context", "pipeline", "replicate"):
        assert any(c.changes.get(f"parallel.{axis}") == 2 for c in found)
