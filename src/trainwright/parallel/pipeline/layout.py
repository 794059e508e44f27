"""What a model's forward passes through, in order: where a pipeline can cut it, and how a part of it runs.

Three kinds of model have a layout: ours, Hugging Face's causal models of the types below, and any model whose forward
is a chain of modules, named by `initialize(pipeline_plan=)`. In a part the modules of other parts are absent: None,
or a stand-in where the model's own forward would call them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.errors import ModelError
from trainwright.models.lstm import LstmLanguageModel
from trainwright.models.output import LMOutput
from trainwright.models.transformer import Transformer

StandIn = Callable[[nn.Module], nn.Module | None]
Forward = Callable[..., Any]


def shallow(module: nn.Module) -> nn.Module:
    """The same module again, with registries of its own and everything in them shared."""
    twin = copy.copy(module)
    for key, value in list(vars(twin).items()):
        if isinstance(value, dict | set):
            vars(twin)[key] = copy.copy(value)
    return twin


class Absent(nn.Module):
    """In the place of a layer that another part holds: hands its first argument on."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class NoPositions(nn.Module):
    """In the place of a position embedding that the first part has added already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


@dataclass(frozen=True)
class Piece:
    """Modules that are never parted, by name, in the order of the forward."""

    names: tuple[str, ...]
    is_block: bool


@dataclass(frozen=True)
class Layout:
    """pieces: all modules with parameters, each once. stand_ins: by module name, what replaces it where it is absent.
    forward: (part, its own forward, is it the last) -> a forward that takes `hidden=` beside the model's inputs, and
    returns an LMOutput with `hidden`, or the model's own output from the last part. holder: what stands for an absent
    module whose weight a part shares (its own copy of it is put in)."""

    pieces: tuple[Piece, ...]
    stand_ins: dict[str, StandIn]
    forward: Callable[[nn.Module, Forward, bool], Forward]
    holder: Callable[[nn.Module], nn.Module] = shallow


def layout_of(model: nn.Module, plan: Sequence[str] | None) -> Layout:
    """The model's layout. Raises ModelError, naming the model, where it has none."""
    if plan is not None:
        return _chain(model, plan)
    if isinstance(model, Transformer):
        return _ours(model, ("embedding",), "blocks", ("norm", "head"))
    if isinstance(model, LstmLanguageModel):
        return _ours(model, ("embedding",), "layers", ("head",))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _HUGGING_FACE and getattr(model, "lm_head", None) is not None:
        return _hugging_face(model, *_HUGGING_FACE[kind])
    raise ModelError(
        f"parallel.pipeline > 1 with {type(model).__name__}" + (f" (model type {kind})" if kind else ""),
        f"a pipeline cuts our models, causal Hugging Face models of type {', '.join(sorted(_HUGGING_FACE))}, and models "
        "whose forward is a chain of modules",
        "parallel.pipeline=1 with zero.stage=3, or initialize(pipeline_plan=['embedding', 'blocks', 'head']) where the "
        "forward passes through these one after another and does nothing in between",
    )


def _none(_: nn.Module) -> None:
    return None


def _members(model: nn.Module, name: str) -> list[Piece]:
    return [
        Piece((f"{name}.{key}",), True)
        for key, member in model.get_submodule(name).named_children()
        if member is not None
    ]


def _ours(model: nn.Module, first: tuple[str, ...], blocks: str, last: tuple[str, ...]) -> Layout:
    pieces = (Piece(first, False), *_members(model, blocks), Piece(last, False))
    return Layout(pieces, {name: _none for piece in pieces for name in piece.names}, lambda part, own, is_last: own)


# Model type -> (modules before the layers with their stand-ins, the layers, the modules after them but the head). All of
# them: tests/unit/parallel/test_pipeline_cut.py compares the parts with the whole for each. Not taken, though they have
# a plan: types whose forward does something of its own to the embeddings and would do it in every part (granite scales
# them, as gemma did, starcoder2 drops out), and mixtures of experts, whose routing losses are left behind in the parts.
LLAMA_LIKE = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo", "olmo2", "olmo3", "smollm3", "glm", "glm4", "helium", "ernie4_5",
    "seed_oss", "cohere",
)  # fmt: skip
_LLAMA_LIKE: tuple[dict[str, StandIn], str, tuple[str, ...]] = ({"embed_tokens": _none}, "layers", ("norm",))
_HUGGING_FACE: dict[str, tuple[dict[str, StandIn], str, tuple[str, ...]]] = {
    "gpt2": (
        {"wte": _none, "wpe": lambda _: NoPositions(), "drop": lambda _: nn.Identity()},
        "h",
        ("ln_f",),
    ),
    **dict.fromkeys(LLAMA_LIKE, _LLAMA_LIKE),
}


def _hugging_face(model: Any, before: dict[str, StandIn], layers: str, after: tuple[str, ...]) -> Layout:
    base = model.base_model_prefix
    first = {f"{base}.{name}": stand_in for name, stand_in in before.items()}
    last = {f"{base}.{name}": lambda _: nn.Identity() for name in after}
    blocks = _members(model, f"{base}.{layers}")
    pieces = (Piece(tuple(first), False), *blocks, Piece((*last, "lm_head"), False))
    absent = {name: _absent_layer for piece in blocks for name in piece.names}
    return Layout(pieces, {**first, **absent, **last, "lm_head": _none}, _hugging_face_forward)


def _absent_layer(layer: nn.Module) -> nn.Module:
    """Models pick masks by such attributes (`attention_type`)."""
    stand_in = Absent()
    for name, value in vars(layer).items():
        if isinstance(value, str | int | bool) and not name.startswith("_") and name != "training":
            setattr(stand_in, name, value)
    return stand_in


def _hugging_face_forward(part: Any, own: Forward, is_last: bool) -> Forward:
    @functools.wraps(own)
    def forward(*args: Any, hidden: Tensor | None = None, **kwargs: Any) -> Any:
        if args:  # input_ids come first
            kwargs["input_ids"], args = args[0], args[1:]
        if hidden is not None:
            del kwargs["input_ids"]
            kwargs["inputs_embeds"] = hidden
        kwargs.setdefault("use_cache", False)
        if is_last:
            return own(*args, **kwargs)
        kwargs.pop("labels", None)
        return LMOutput(hidden=part.base_model(*args, **kwargs)[0])

    return forward


def _chain(model: nn.Module, plan: Sequence[str]) -> Layout:
    """Each module of the plan in turn; a ModuleList or Sequential member by member."""
    known = dict(model.named_modules())
    pieces: list[Piece] = []
    for name in plan:
        if name not in known or not name:
            near = [other for other, _ in model.named_children()]
            raise ModelError(
                f"pipeline_plan names {name!r}", f"modules of {type(model).__name__} by name", f"among {near}"
            )
        if isinstance(known[name], nn.ModuleList | nn.Sequential):
            pieces += _members(model, name)
        else:
            pieces.append(Piece((name,), False))
    if not any(piece.is_block for piece in pieces):
        pieces = [Piece(piece.names, True) for piece in pieces]
    stand_ins: dict[str, StandIn] = {name: lambda _: Absent() for piece in pieces for name in piece.names}
    order = [name for piece in pieces for name in piece.names]

    def chain_forward(part: nn.Module, own: Forward, is_last: bool) -> Forward:
        @functools.wraps(own)
        def forward(*args: Any, hidden: Tensor | None = None, **kwargs: Any) -> Any:
            name = None if args else next(iter(kwargs))
            value = (args[0] if args else kwargs[name]) if hidden is None else hidden  # type: ignore[index]
            if is_last:  # its own forward knows the loss; what is absent hands the value on
                return own(value, *args[1:], **kwargs) if name is None else own(**{**kwargs, name: value})
            for piece in order:
                value = part.get_submodule(piece)(value)  # absent ones hand on
            return LMOutput(hidden=value)

        return forward

    # Its own forward would call what it finds: a holder hands on, too.
    return Layout(tuple(pieces), stand_ins, chain_forward, lambda _: Absent())
