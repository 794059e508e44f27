"""Pipeline parts against the whole model: the same output to the last bit, every parameter once under its own name."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from small import Awkward, Residual, transformer, with_values
from trainwright.config.schema import ParallelConfig
from trainwright.errors import ModelError
from trainwright.models.deferred import recipes_of
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.pretrained import build_causal, build_huggingface, shifts_labels
from trainwright.parallel.pipeline.balance import partition
from trainwright.parallel.pipeline.cut import cut, held_elsewhere, joined, part_of
from trainwright.parallel.pipeline.layout import LLAMA_LIKE

IDS = torch.arange(22).view(2, 11) % 37


def settings(ranks: int, schedule: str = "1f1b", virtual: int | None = None) -> ParallelConfig:
    return ParallelConfig(pipeline=ranks, pipeline_schedule=schedule, virtual_stages=virtual)


def rank_parts(model: nn.Module, rank: int, parallel: ParallelConfig, plan: Any = None) -> list[nn.Module]:
    degrees = SimpleNamespace(pipeline=parallel.pipeline)
    mesh: Any = SimpleNamespace(degrees=degrees, coordinate=lambda axis: rank)
    return cut(copy.deepcopy(model), mesh, parallel, plan)


def all_parts(model: nn.Module, parallel: ParallelConfig, plan: Any = None) -> list[nn.Module]:
    parts = [part for rank in range(parallel.pipeline) for part in rank_parts(model, rank, parallel, plan)]
    return sorted(parts, key=lambda part: part_of(part).index)


def through(parts: list[nn.Module], **inputs: Tensor) -> Any:
    hidden = None
    for part in parts:
        part_of(part).hidden = hidden
        output = part(**inputs)
        hidden = getattr(output, "hidden", None)
    return output


def check_names(model: nn.Module, parts: list[nn.Module]) -> None:
    """Each parameter in one part, but the shared ones, with the model's own names and values; the rest is elsewhere."""
    own = dict(model.named_parameters())
    held = [dict(part.named_parameters()) for part in parts]
    shared = part_of(parts[0]).shared
    for name, value in own.items():
        copies = [parameters[name] for parameters in held if name in parameters]
        assert len(copies) == len(shared.get(name, (0,))), name
        assert all(torch.equal(copy, value) for copy in copies)
    for part, parameters in zip(parts, held, strict=True):
        assert parameters.keys() | (held_elsewhere(part) & own.keys()) == own.keys()
        assert not parameters.keys() & held_elsewhere(part)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_our_transformer_compute_what_the_whole_does(schedule: str, tied: bool) -> None:
    model = with_values(lambda: transformer(layers=5, tied=tied))
    parts = all_parts(model, settings(2, schedule))
    assert len(parts) == (2 if schedule == "1f1b" else 4)
    expected = model(IDS, labels=IDS)
    assert torch.equal(through(parts, input_ids=IDS, labels=IDS).loss_sum, expected.loss_sum)
    assert part_of(parts[0]).shared == ({"embedding.weight": (0, len(parts) - 1)} if tied else {})
    check_names(model, parts)


def test_parts_of_the_lstm_compute_what_the_whole_does() -> None:
    model = LstmLanguageModel(LstmSettings(vocab_size=37, embedding_dim=8, hidden_dim=8, layers=4, tied=True))
    parts = all_parts(model, settings(2, "interleaved_1f1b"))
    assert torch.equal(through(parts, input_ids=IDS, labels=IDS).loss_sum, model(IDS, labels=IDS).loss_sum)
    check_names(model, parts)


def tiny_config(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    else:
        sizes = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip
    return transformers.AutoConfig.for_model(kind, vocab_size=61, **sizes)


@pytest.mark.parametrize("kind", ["gpt2", *LLAMA_LIKE])
def test_parts_of_hugging_face_models_compute_what_the_whole_does(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    parts = all_parts(model, settings(2, "interleaved_1f1b"))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
    expected, found = model(**inputs), through(parts, **inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert shifts_labels(parts[-1])
    check_names(model, parts)


def test_deferred_models_keep_their_recipes_and_their_kind() -> None:
    pytest.importorskip("transformers")
    model = build_causal(tiny_config("gpt2"))
    for part in all_parts(model, settings(2)):
        assert all(parameter.is_meta for parameter in part.parameters())
        assert {name for name, _ in part.named_parameters()} <= recipes_of(part).keys()
        assert not shifts_labels(part)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 10)
        self.blocks = nn.ModuleList(Residual(10) for _ in range(4))
        self.head = nn.Linear(10, 37, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_users_own_chain_of_modules_is_cut_by_its_plan() -> None:
    model = Chain()
    parts = all_parts(model, settings(2, "interleaved_1f1b"), ["embedding", "blocks", "head"])
    assert torch.equal(through(parts, input_ids=IDS, labels=IDS)["loss"], model(IDS, IDS)["loss"])
    check_names(model, parts)


def test_a_rank_with_two_parts_shows_one_module_of_the_models_class() -> None:
    model = with_values(lambda: transformer(layers=5))
    parts = rank_parts(model, 1, settings(2, "interleaved_1f1b"))
    view = joined(parts)
    assert type(view) is type(model)
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert [name for name, _ in view.named_parameters()] == sorted(names, key=[*dict(model.named_parameters())].index)
    view.eval()
    assert not any(module.training for part in parts for module in part.modules())


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match=r"(?s)3 blocks.*parallel\.pipeline=3"):
        all_parts(transformer(layers=3), settings(4))
    with pytest.raises(
        ModelError, match=r"(?s)2 parts a rank.*parallel\.pipeline=2, or parallel\.pipeline_schedule=1f1b"
    ):
        all_parts(transformer(layers=5), settings(3, "zbv"))
    with pytest.raises(ModelError, match=r"(?s)BertForMaskedLM.*bert.*pipeline_plan"):
        all_parts(build_huggingface(tiny_bert()), settings(2))
    with pytest.raises(ModelError, match="Awkward"):
        all_parts(Awkward(), settings(2))
    with pytest.raises(ModelError, match=r"frozen\.weight"):
        all_parts(Awkward(), settings(2), ["embedding", "blocks", "head"])
    with pytest.raises(ModelError, match="'body'"):
        all_parts(Chain(), settings(2), ["embedding", "body"])


def tiny_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 9))
def test_the_partition_is_the_best_of_all(costs: list[int], count: int) -> None:
    count = min(count, len(costs))
    runs = partition(costs, count)
    assert [stop for _, stop in runs[:-1]] == [start for start, _ in runs[1:]]
    assert all(start < stop for start, stop in runs)

    def score(cuts: list[int]) -> tuple[int, int]:
        ends = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        return max(sums), sum(value * value for value in sums)

    def every(start: int, left: int) -> list[list[int]]:
        if not left:
            return [[]]
        return [[cut, *rest] for cut in range(start + 1, len(costs)) for rest in every(cut, left - 1)]

    assert score([stop for _, stop in runs[:-1]]) == min(score(cuts) for cuts in every(0, count - 1))


def test_the_head_weighs_in() -> None:
    """A vocabulary as dear as two blocks takes two blocks off the last part."""
    model = transformer(layers=6, dim=24, vocab_size=500, tied=False)
    first, last = all_parts(model, settings(2))
    assert len(part_of(first).blocks[0]) > len(part_of(last).blocks[1])
