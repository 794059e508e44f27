"""Pipelines against one unsharded process, in float64: every schedule x ZeRO stage, tied and untied, with recomputation and
dropout; the LSTM, Llama, GPT-2 and a user's chain of modules; checkpoints to other layouts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainwright as tw
from ranks import run_ranks
from small import VOCAB, Residual, batches, mean_loss, relative, share, transformer, with_values
from trainwright.config import load_config
from trainwright.config.model_schema import ModelConfig
from trainwright.config.schema import ParallelConfig
from trainwright.data.batch import Batch
from trainwright.model_source import model_for
from trainwright.models.dropout import dropout_context
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.parallel.pipeline.order import replay
from trainwright.parallel.pipeline.schedule import recorded_orders
from trainwright.startup import UserParts, build_engine
from trainwright.torch_private.autograd import parts_backwards
from trainwright.verification.lift import Float64

STEPS, ROWS = 3, 16
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv")


class Chain(nn.Module):
    """A user's own model, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 10)
        self.blocks = nn.ModuleList(Residual(10) for _ in range(4))
        self.head = nn.Linear(10, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def build(kind: str) -> nn.Module:
    name, _, variant = kind.partition("/")
    if name == "transformer":
        return transformer(
            layers=5, tied="untied" not in variant, dropout=0.2 if "dropout" in variant else 0.0, dim=22, ffn_dim=38
        )
    if name == "lstm":
        return LstmLanguageModel(LstmSettings(VOCAB, 12, 12, layers=4, dropout=0.1, tied="tied" in variant))
    if name == "chain":
        return Chain()
    import transformers

    sizes = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "llama":
        config: Any = transformers.LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            **sizes,
        )
        return transformers.LlamaForCausalLM(config)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=24, n_layer=4, n_head=4, n_positions=16, **off, **sizes)
    )


@dataclass(frozen=True)
class Case:
    kind: str
    ranks: int
    schedule: str
    stage: int = 0
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    plan: tuple[str, ...] | None = None

    def config(self) -> dict[str, Any]:
        parallel = {"pipeline": self.ranks, "pipeline_schedule": self.schedule, **self.more.get("parallel", {})}
        base = {"precision": "fp64", "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}, "batch": {"accumulation": 4}}
        return {**base, "zero": self.stage, **self.more, "parallel": parallel}


def whole_batch(kind: str, tokens: Tensor, labels: Tensor) -> Any:
    """Hugging Face models and the chain take dicts; ours a Batch, whose samples have numbers (dropout)."""
    if kind.startswith(("transformer", "lstm")):
        return lambda rows: Batch(tokens[rows], labels[rows], None, torch.arange(ROWS)[rows], 0)
    return lambda rows: {"input_ids": tokens[rows], "labels": labels[rows]}


def data(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return batches(steps, rows=ROWS)


def train(engine: Any, kind: str, steps: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    replicas = engine.parts.mesh.data_parallel_size
    rows = share(torch.arange(ROWS), engine.parts.mesh.data_parallel_rank, replicas)
    losses, norms = [], []
    for tokens, labels in steps:
        losses.append(engine.train_batch(whole_batch(kind, tokens, labels)(rows)))
        norms.append(engine.grad_norm)
    return losses, norms


def lifting(kind: str) -> Any:
    return Float64() if kind.startswith(("llama", "gpt2")) else contextlib.nullcontext()


def run_case(case: Case) -> dict[str, Any]:
    engine = tw.initialize(model=lambda: build(case.kind), config=case.config(), pipeline_plan=case.plan)
    model = engine.parts.model
    with lifting(case.kind):
        losses, norms = train(engine, case.kind, data())
        tokens, labels = data()[0]
        rows = share(torch.arange(ROWS), engine.parts.mesh.data_parallel_rank, engine.parts.mesh.data_parallel_size)
        evaluated = engine.evaluate([whole_batch(case.kind, tokens, labels)(rows)]).loss
    # Gradients, optimizer and values of a tied weight's copies, over the ranks that hold them.
    tied = {name: (held[0] + 0).to_local().clone() for name, held in model._copies.here.items() if held}
    moments = engine.parts.update.optimizer.state()
    result = {
        "losses": losses, "norms": norms, "evaluated": evaluated, "state": engine.full_state_dict(), "tied": tied,
        "moments": {name: moments[f"{name}.exp_avg"].to_local().clone() for name in tied},
        "actions": model.actions, "stage": engine.parts.mesh.coordinate("pipeline"),
        "place": [engine.parts.mesh.coordinate(axis) for axis in ("replicate", "shard", "context", "tensor")],
    }  # fmt: skip
    engine.close()
    return result


def run_cases(rank: int, cases: list[Case]) -> list[Any]:
    return [run_case(case) for case in cases]


def reference(kind: str) -> tuple[list[float], list[float], dict[str, Tensor], float]:
    """torch's own loop on the whole batch."""
    model = with_values(lambda: build(kind)).double()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    losses, norms = [], []

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        output = model(input_ids=tokens, labels=labels)
        return output if isinstance(output, Tensor) else mean_loss(output)

    with lifting(kind):
        for step, (tokens, labels) in enumerate(data()):
            with dropout_context(0, step, torch.arange(ROWS)):
                loss = loss_of(tokens, labels)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            evaluated = loss_of(*data()[0]).item()
    return losses, norms, {name: t.detach() for name, t in model.state_dict().items()}, evaluated


def check(cases: list[Case], by_rank: list[list[Any]]) -> None:
    references = {kind: reference(kind) for kind in {case.kind for case in cases}}
    for index, case in enumerate(cases):
        losses, norms, state, evaluated = references[case.kind]
        results = [ranks[index] for ranks in by_rank]
        found = results[0]
        assert max(relative(a, b) for a, b in zip(found["losses"], losses, strict=True)) < 1e-9, case
        assert max(relative(a, b) for a, b in zip(found["norms"], norms, strict=True)) < 1e-7, case
        assert relative(found["evaluated"], evaluated) < 1e-8, case
        assert found["state"].keys() == state.keys(), case
        for name, tensor in state.items():
            error = ((found["state"][name].double() - tensor).norm() / tensor.norm().clamp(min=1e-4)).item()
            assert error < 1e-8, f"{case}: {name} {error:.2g}"
        for other in results[1:]:
            assert other["losses"] == found["losses"], f"{case}: the loss is not the same on all ranks"
            assert other["norms"] == found["norms"], case
            assert not other["state"], case
        holders = {(tuple(result["place"]), name) for result in results for name in result["tied"]}
        for place, name in holders:
            copies = [r for r in results if tuple(r["place"]) == place and name in r["tied"]]
            for copy in copies[1:]:
                assert torch.equal(copy["tied"][name], copies[0]["tied"][name]), f"{case}: {name} came apart"
                assert torch.equal(copy["moments"][name], copies[0]["moments"][name]), f"{case}: {name}'s moments"


CASES_2 = [
    *(Case("transformer/dropout", 2, schedule, 2) for schedule in SCHEDULES),
    *(Case("transformer/untied", 2, schedule, 1, {"recompute": "full"}) for schedule in ("1f1b", "zero_bubble")),
    Case("transformer/dropout", 2, "zbv", 0, {"recompute": "selective"}),
    *(Case("lstm/tied", 2, schedule, 2) for schedule in ("1f1b", "zero_bubble")),
    Case("llama", 2, "interleaved_1f1b", 3),
    Case("gpt2", 2, "zbv", 1),
    Case("chain", 2, "interleaved_1f1b", 2, plan=("embedding", "blocks", "head")),
]
CASES_4 = [
    *(Case("transformer/dropout", 2, schedule, stage) for schedule in SCHEDULES for stage in (0, 1, 2)),
    *(Case("transformer/untied", 2, schedule, 3, {"recompute": "full"}) for schedule in SCHEDULES[:3]),
    Case("transformer/dropout", 4, "gpipe", 3),
    Case("transformer/dropout", 4, "1f1b", 0),
    Case("transformer/untied", 2, "zbv", 2, {"recompute": "selective"}),
    Case("lstm/tied", 2, "zbv", 2),
    Case("gpt2", 2, "1f1b", 3),
    Case("gpt2", 4, "1f1b", 1),
    Case("llama", 2, "zero_bubble", 2),
    Case("chain", 2, "zbv", 2, plan=("embedding", "blocks", "head")),
    Case("transformer/dropout", 2, "zbv", 2, {"parallel": {"tensor": 2}}),
    Case("transformer/dropout", 2, "1f1b", 2, {"parallel": {"context": 2}}),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "cases"), [(2, CASES_2), (4, CASES_4)])
def test_a_pipeline_trains_what_one_unsharded_process_does(world_size: int, cases: list[Case]) -> None:
    pytest.importorskip("transformers")
    by_rank = run_ranks(run_cases, world_size, cases)
    check(cases, by_rank)
    for index, case in enumerate(cases):
        # What the ranks really computed, in the order that the schedule plans.
        orders = {ranks[index]["stage"]: ranks[index]["actions"] for ranks in by_rank}
        parallel = ParallelConfig(pipeline=case.ranks, pipeline_schedule=case.schedule)
        planned = recorded_orders(parallel, 4)
        # Backwards run whole: recomputation for each half would cost more than it saves, torch 2.11 cannot part ours.
        if "recompute" in case.more or not parts_backwards():
            planned = {rank: [a._replace(kind=a.kind.replace("I", "B")) for a in actions if a.kind != "W"]
                       for rank, actions in planned.items()}  # fmt: skip
        assert {stage: [tuple(a) for a in actions] for stage, actions in orders.items()} == planned, case
        assert replay(orders).idle == replay(planned).idle


KIND = "transformer/dropout"
PIPELINE_2X2: dict[str, Any] = {"parallel": {"pipeline": 2, "pipeline_schedule": "1f1b"}, "zero": 2}
LAYOUTS_4: list[dict[str, Any]] = [
    PIPELINE_2X2,
    {"parallel": {"pipeline": 2, "pipeline_schedule": "zbv"}, "zero": 1},
    {"parallel": {"pipeline": 4, "pipeline_schedule": "gpipe"}, "zero": 3},
    {"parallel": {}, "zero": 3, "batch": {"accumulation": 1}},
]
ALONE: dict[str, Any] = {"parallel": {}, "batch": {"accumulation": 2}}


def _go_on(layout: dict[str, Any], save: Path | None = None, load: Path | None = None) -> list[Any]:
    """Steps 4 and 5, from a checkpoint or after 3 steps of its own (and a save): losses, weights, averaged weights."""
    engine = tw.initialize(model=lambda: build(KIND), config=Case(KIND, 1, "1f1b").config() | {"ema": 0.9} | layout)
    if save is not None:
        train(engine, KIND, data(5)[:3])
        engine.save(save)
    if load is not None:
        engine.load(load)
    losses, _ = train(engine, KIND, data(5)[3:])
    with engine.averaged_weights():
        averaged = engine.full_state_dict()
    found = [losses, engine.full_state_dict(), averaged]
    engine.close()
    return found


def _checkpoints(rank: int, folder: Path) -> list[list[Any]]:
    found = [_go_on(PIPELINE_2X2, save=folder / "pipeline")]
    found += [_go_on(layout, load=folder / "pipeline") for layout in LAYOUTS_4]
    return [*found, _go_on(PIPELINE_2X2, load=folder / "alone")]


def test_a_checkpoint_of_a_pipeline_goes_on_in_any_layout_and_back(tmp_path: Path) -> None:
    expected = _go_on(ALONE, save=tmp_path / "alone")
    found = run_ranks(_checkpoints, 4, tmp_path)[0]
    found.append(_go_on(ALONE, load=tmp_path / "pipeline"))
    for losses, *weights in found:
        assert max(relative(a, b) for a, b in zip(losses, expected[0], strict=True)) < 1e-9
        for kept, wanted in zip(weights, expected[1:], strict=True):
            assert kept.keys() == wanted.keys()
            assert all(torch.allclose(kept[name], wanted[name], rtol=1e-9, atol=1e-12) for name in wanted)


def _pretrained(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in ("llama", "gpt2"):
        module, fill = model_for(ModelConfig(huggingface=str(folder / kind), weights="pretrained"))
        config = load_config({"parallel": {"pipeline": 2}, "batch": {"accumulation": 2}})
        engine = build_engine(module, config, UserParts(load_weights=fill), None)
        found[kind] = engine.full_state_dict()
        tokens, labels = data()[0]
        assert engine.train_batch(Batch(tokens, labels, None, torch.arange(ROWS), 0)) > 0
        engine.close()
    return found


def test_each_stage_reads_its_own_part_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    models = {kind: build(kind) for kind in ("llama", "gpt2")}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    found = run_ranks(_pretrained, 2, tmp_path)[0]
    for kind, model in models.items():
        expected = model.state_dict()
        assert found[kind].keys() == expected.keys()
        assert all(torch.equal(found[kind][name], expected[name]) for name in expected)


def _odds_and_ends(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    base = {"parallel": {"pipeline": 2}, "batch": {"accumulation": 4}}
    tokens, labels = data()[0]
    batch = {"input_ids": tokens, "labels": labels}
    # A module that comes with its values (those of rank 0), and one with a frozen embedding.
    torch.manual_seed(rank)
    model = transformer(layers=3)
    mine = mean_loss(model(tokens, labels=labels)).item()
    engine = tw.initialize(model=model, config=base)
    found["materialised"] = engine.train_batch(batch), mine
    for call in (lambda: engine(tokens, labels=labels), lambda: engine.generate([[1, 2]])):
        with pytest.raises(tw.errors.UsageError) as error:
            call()
        found.setdefault("refused", []).append(str(error.value))
    with pytest.raises(tw.errors.UsageError) as error:
        engine.train_batch({"input_ids": tokens[:15], "labels": labels[:15]})
    found["uneven"] = str(error.value)
    found["says"] = engine.parts.model.describe()
    # Another length, then the first again: other shapes have stages of their own.
    engine.train_batch({"input_ids": tokens[:, :4], "labels": labels[:, :4]})
    engine.train_batch(batch)
    engine.close()
    with pytest.raises(tw.errors.ConfigError) as refused:
        tw.initialize(model=lambda: build("transformer"), config=base | {"batch": {}}).train_batch(batch)
    found["few"] = str(refused.value)
    for name, more in {
        "frozen": {"freeze": ["embedding.*", "blocks.0.*"]}, "muon": {"optimizer": {"name": "muon"}},
        "bf16": {"precision": "bf16"}, "fp16": {"precision": {"dtype": "fp16", "loss_scale": 1024}},
        "bf16_zero_bubble": {"precision": "bf16", "parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble"}},
        "groups": {"optimizer": {"groups": [{"pattern": "blocks.0.*", "lr_scale": 0.5}]}},
        "kept": {"precision": "bf16", "keep_fp32": ["norm"]},
    }.items():  # fmt: skip
        engine = tw.initialize(model=lambda: build("transformer/untied"), config=base | more)
        losses = [engine.train_batch({"input_ids": x, "labels": y}) for x, y in data(3)]
        found[name] = losses, engine.grad_norm
        engine.close()
    return found


def test_odds_and_ends() -> None:
    first, second = run_ranks(_odds_and_ends, 2)
    value, expected = first["materialised"]
    assert value == pytest.approx(expected, rel=1e-6)
    assert value == second.pop("materialised")[0] != pytest.approx(second["frozen"][0][0])
    assert second.items() <= first.items()
    assert all("train_batch" in text or "parallel.pipeline=1" in text for text in first["refused"])
    assert "4 x n rows" in first["uneven"]
    assert first["says"] == (
        "Pipeline parts: blocks.0 to 1 | blocks.2; whole gradients are held until the last micro-batch"
    )
    assert "batch.accumulation=8" in first["few"]
    exact, _, _, _ = reference("transformer/untied")
    for name in ("bf16", "fp16", "bf16_zero_bubble", "kept"):
        assert relative(first[name][0][0], exact[0]) < 2e-2, name
    assert first["groups"][0] != first["muon"][0]
