"""The matrix as data: which models, under which changes of the config, on how many ranks.

A case that the strategy refuses stays in the table: its row says why. One that needs more ranks than there are is left
out and counted. All models are tiny: what is proved is the arithmetic of a layout, which does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.transformer import Transformer, TransformerSettings

VOCABULARY = 37
"""Odd, so that no vocabulary divides over the ranks."""
LENGTH = 6
ROWS = 12
"""Sequences of a global batch: divides over 1, 2, 3, 4 and 6 micro-batches; other sizes where a case says so."""


@dataclass(frozen=True)
class Case:
    """A composition."""

    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the config."""
    note: str = ""
    """What the strategy's own words do not say."""

    @property
    def ranks(self) -> int:
        """Ranks that the layout needs; more become data-parallel ones, so the number divides theirs."""
        degrees = (self.changes.get(f"parallel.{axis}", 1) for axis in ("tensor", "context", "pipeline", "replicate"))
        product = 1
        for degree in degrees:
            product *= degree
        return product


def cases() -> list[Case]:
    """All of them, grouped by what they are about."""
    return [
        *_grid(),
        *_schedules(),
        *_recompute(),
        *_variants(),
        *_other_models(),
        *_optimizers(),
        *_fused(),
        *_refused(),
    ]


_LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"parallel.tensor": 2},
    {"parallel.context": 2},
    {"parallel.pipeline": 2},
    {"parallel.tensor": 2, "parallel.context": 2},
    {"parallel.tensor": 2, "parallel.pipeline": 2},
    {"parallel.context": 2, "parallel.pipeline": 2},
    {"parallel.tensor": 2, "parallel.context": 2, "parallel.pipeline": 2},
)
_ONE_AXIS = _LAYOUTS[:4]


def _case(
    model: str, layout: dict[str, Any], *, stage: int, accumulation: int, dtype: str = "fp32", **others: Any
) -> Case:
    note = others.pop("note", "")
    changes = {**layout, "zero.stage": stage, "batch.accumulation": accumulation, "precision.dtype": dtype}
    return Case(model, {**changes, **{key.replace("__", "."): value for key, value in others.items()}}, note)


def _accumulations(layout: dict[str, Any]) -> tuple[int, int]:
    # A pipeline needs a micro-batch for each of its ranks at least.
    return (2, 3) if "parallel.pipeline" in layout else (1, 3)


def _grid() -> Iterator[Case]:
    """ZeRO 0-3 x tensor 1/2 x context 1/2 x pipeline 1/2 x accumulation x fp32/bf16, and hybrid sharding.

    Where two axes meet, each stage and accumulation has one of the formats, in turn: the float64 proof is the same for both.
    """
    for number, layout in enumerate(_LAYOUTS):
        for stage in (0, 1, 2, 3):
            for accumulation in _accumulations(layout):
                formats: tuple[str, ...] = ("fp32", "bf16")
                if number >= len(_ONE_AXIS):
                    formats = formats[(stage + accumulation) % 2 :][:1]
                for dtype in formats:
                    yield _case("transformer", layout, stage=stage, accumulation=accumulation, dtype=dtype)
    for stage in (1, 2, 3):
        for accumulation in (1, 3):
            yield _case("transformer", {"parallel.replicate": 2}, stage=stage, accumulation=accumulation)
    for axis in ("tensor", "context", "pipeline"):
        yield _case("transformer", {"parallel.replicate": 2, f"parallel.{axis}": 2}, stage=3, accumulation=3)
    for stage, layout in ((0, {}), (2, {}), (3, {}), (2, {"parallel.tensor": 2})):
        yield _case("transformer", layout, stage=stage, accumulation=3, dtype="fp16")


# What follows differs from the grid in arithmetic, not in formats: float64 alone.


def _schedules() -> Iterator[Case]:
    for schedule in ("gpipe", "interleaved_1f1b", "zero_bubble", "zbv"):
        model = "transformer" if schedule == "gpipe" else "four blocks"
        for stage in (0, 2) if schedule in ("zero_bubble", "zbv") else (0, 2, 3):
            layout = {"parallel.pipeline": 2, "parallel.pipeline_schedule": schedule}
            yield _case(model, layout, stage=stage, accumulation=4, dtype="fp64")
    for schedule in ("gpipe", "1f1b"):
        layout = {"parallel.pipeline": 4, "parallel.pipeline_schedule": schedule}
        yield _case("four blocks", layout, stage=0, accumulation=6, dtype="fp64")
    layout = {"parallel.pipeline": 2, "parallel.tensor": 2, "parallel.pipeline_schedule": "interleaved_1f1b"}
    yield _case("four blocks", layout, stage=1, accumulation=4, dtype="fp64")


def _recompute() -> Iterator[Case]:
    for layout in _ONE_AXIS:
        words: dict[str, Any] = {"accumulation": _accumulations(layout)[1], "dtype": "fp64"}
        yield _case("dropout", layout, stage=3, recompute__mode="full", note="dropout 0.1", **words)
        yield _case("transformer", layout, stage=2, recompute__mode="selective", **words)
        every = {"recompute.mode": "full", "recompute.every": 2}
        yield _case("transformer", {**layout, **every}, stage=3, note="every second block", **words)


def _variants() -> Iterator[Case]:
    """Our transformer with dropout, untied, with QK-norm; batches and lengths that do not divide."""
    for layout in _ONE_AXIS:
        words: dict[str, Any] = {"accumulation": _accumulations(layout)[1], "dtype": "fp64"}
        yield _case("dropout", layout, stage=2, note="dropout 0.1", **words)
        yield _case("untied", layout, stage=3, note="untied head", **words)
        yield _case("untied", layout, stage=0, note="untied head", **words)
        yield _case("qk_norm", layout, stage=3, note="QK-norm", **words)
        documents = {"data.document_mask": True}
        yield _case("dropout", {**layout, **documents}, stage=3, note="document mask", **words)
        yield _case("llama", {**layout, **documents}, stage=2, note="document mask", **words)
        yield _case("gpt2", {**layout, **documents}, stage=1, note="document mask", **words)
        terms = {"loss.label_smoothing": 0.1, "loss.z_loss": 1e-3}
        yield _case("transformer", {**layout, **terms}, stage=2, note="label smoothing, z-loss", **words)
        yield _case("transformer", {**layout, "batch.global_size": 11}, stage=2, note="11 rows", **words)
        yield _case("transformer", {**layout, "data.sequence_length": 7}, stage=3, note="7 tokens a row", **words)


def _other_models() -> Iterator[Case]:
    for model in ("lstm", "gpt2", "llama", "bert", "t5"):
        for stage in (0, 1, 2, 3):
            accumulation, dtype = (3 if stage % 2 else 1), ("bf16" if stage == 2 else "fp32")
            yield _case(model, {}, stage=stage, accumulation=accumulation, dtype=dtype)
        for layout in _ONE_AXIS[1:]:
            yield _case(model, layout, stage=2, accumulation=3, dtype="fp64")
        yield _case(model, {}, stage=3, accumulation=3, dtype="fp64", recompute__mode="full")
    yield _case("lstm dropout", {}, stage=2, accumulation=3, dtype="fp64", note="dropout 0.1")


def _fused() -> Iterator[Case]:
    """Optimizer in backward, one micro-batch a step, with the ways of clipping that it has."""
    for layout in ({}, {"parallel.tensor": 2}, {"parallel.context": 2}, {"parallel.replicate": 2}):
        for stage in (1, 3):
            for clipping in ("per_parameter", "late"):
                words = {
                    **layout,
                    "gradient_clipping": 0.5,
                    "fused.optimizer_in_backward": True,
                    "fused.clipping": clipping,
                }
                yield _case(
                    "transformer",
                    words,
                    stage=stage,
                    accumulation=1,
                    dtype="fp64",
                    note=f"update in backward, {clipping}",
                )


def _optimizers() -> Iterator[Case]:
    named: dict[str, dict[str, Any]] = {
        "sgd": {"optimizer.lr": 0.1, "optimizer.momentum": 0.9},
        "adam": {"optimizer.lr": 1e-3},
        "torch.optim.RMSprop": {"optimizer.lr": 1e-4},
        "lion": {"optimizer.lr": 1e-3},
        "muon": {"optimizer.lr": 1e-2},
    }
    for name, words in named.items():
        changes = {"optimizer.name": name, **words}
        yield _case("transformer", changes, stage=2, accumulation=3, dtype="fp64", note=name)
    others = (
        ({"freeze": ["embedding.*"]}, 3, "embedding frozen"),
        ({"offload.parameters": "cpu"}, 3, "parameters on the host"),
        ({"offload.parameters": "disk"}, 3, "parameters on the disk"),
    )
    for changes, stage, note in others:
        yield _case("transformer", changes, stage=stage, accumulation=3, dtype="fp64", note=note)
    on_disk = {"offload.optimizer": "disk"}
    yield _case("transformer", on_disk, stage=3, accumulation=3, dtype="fp32", note="moments on the disk")
    on_disk |= {"offload.masters": "disk"}
    yield _case("transformer", on_disk, stage=3, accumulation=1, dtype="bf16", note="masters on the disk")


def _refused() -> Iterator[Case]:
    """What cannot be right is refused by name."""
    yield _case("transformer", {"parallel.pipeline": 2}, stage=1, accumulation=1)
    for schedule in ("zero_bubble", "zbv"):
        layout = {"parallel.pipeline": 2, "parallel.pipeline_schedule": schedule}
        yield _case("four blocks", layout, stage=3, accumulation=4)


def _transformer(**changes: Any) -> Callable[[], nn.Module]:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn_dim": 40, "tied": True,
    }  # fmt: skip
    return lambda: Transformer(TransformerSettings(**(settings | changes)))


def _lstm(dropout: float = 0.0) -> Callable[[], nn.Module]:
    settings = LstmSettings(vocab_size=VOCABULARY, embedding_dim=12, hidden_dim=18, layers=2, dropout=dropout)
    return lambda: LstmLanguageModel(settings)


def _huggingface(kind: str) -> Callable[[], nn.Module]:
    """A tiny model of Hugging Face's own classes, random weights, without dropout."""

    def build() -> nn.Module:
        import transformers

        common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if kind == "llama":
            llama = transformers.LlamaConfig(
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **common,
            )
            return transformers.LlamaForCausalLM(llama)
        if kind == "gpt2":
            rates: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            gpt2 = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=16, **rates, **common)
            return transformers.GPT2LMHeadModel(gpt2)
        if kind == "bert":
            bert = transformers.BertConfig(
                hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, max_position_embeddings=16,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common,
            )  # fmt: skip
            return transformers.BertForMaskedLM(bert)
        common["decoder_start_token_id"] = 0
        t5 = transformers.T5Config(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0, **common)
        return transformers.T5ForConditionalGeneration(t5)

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": _transformer(),
    "four blocks": _transformer(layers=4),
    "dropout": _transformer(dropout=0.1),
    "untied": _transformer(tied=False),
    "qk_norm": _transformer(qk_norm=True),
    "lstm": _lstm(),
    "lstm dropout": _lstm(0.1),
    "gpt2": _huggingface("gpt2"),
    "llama": _huggingface("llama"),
    "bert": _huggingface("bert"),
    "t5": _huggingface("t5"),
}
FROM_TRANSFORMERS = frozenset({"gpt2", "llama", "bert", "t5"})
TITLES = {"four blocks": "transformer", "dropout": "transformer", "untied": "transformer", "qk_norm": "transformer",
          "lstm dropout": "lstm"}  # fmt: skip
"""Under which name a model's rows stand."""
