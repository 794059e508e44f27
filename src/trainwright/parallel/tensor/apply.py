"""Tensor parallelism: a model's matrices cut over ranks by its plan (Shoeybi et al., arXiv 1909.08053), the residual
stream along the sequence where the model has a place for that (Korthikanti et al., arXiv 2205.05198).

Order: plan -> refusals -> parameters as DTensors on the tensor mesh -> forwards that compute this rank's part.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ModelError
from trainwright.mesh import Mesh
from trainwright.parallel.collectives import GroupRanks
from trainwright.parallel.tensor.styles import (
    COLUMN,
    EMBEDDING,
    GATHERED,
    ROW,
    STYLES,
    Cutting,
    ResidualPart,
    cut_parameter,
    features,
    install,
    placement,
)


def apply_tensor(module: nn.Module, mesh: Mesh, settings: ParallelConfig, plan: Mapping[str, str] | None) -> None:
    """Cuts `module` over the tensor ranks, in place; does nothing where there is one.

    Afterwards every parameter is a DTensor on `mesh.tensor`, under its old name; activations stay plain tensors. Values
    that are there are the same on all ranks; nothing is sent.

    plan: module name pattern (* stands for one part of a name) -> style, instead of the model's own table.
    Errors: ModelError, naming the layer, where there is no table, a style is not known, or a size does not divide.
    """
    if mesh.degrees.tensor == 1:
        return
    ranks = GroupRanks(mesh.group("tensor"), mesh.degrees.tensor, mesh.coordinate("tensor"))
    own_stream = hasattr(module, "residual_cut")
    cutting = Cutting(mesh.tensor, ranks, sequence=settings.sequence and own_stream, entered=own_stream)
    whole = mesh.degrees.pipeline == 1
    styles = _with_tied(module, _styles(module, plan, whole))
    for name, style in styles.items():
        _check(module, name, style, mesh)
    _cut_parameters(module, styles, cutting)
    for name, owner in module.named_modules():
        if any(p is not None for p in owner._parameters.values()):
            install(owner, styles.get(name), cutting)
    if own_stream:
        module.residual_cut = functools.partial(ResidualPart, cutting)  # type: ignore[assignment]


def _styles(module: nn.Module, plan: Mapping[str, str] | None, whole: bool) -> dict[str, str]:
    """Module name -> style."""
    table = plan if plan is not None else _own_table(module)
    names = {name for name, _ in module.named_modules() if name}
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    styles: dict[str, str] = {}
    for pattern, style in table.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        matches = sorted(name for name in names if expression.fullmatch(name))
        parameters = sorted(name for name in held - names if expression.fullmatch(name))
        if style not in STYLES or parameters:
            if not matches and not parameters:
                continue  # a layer that this model does not have
            raise ModelError(
                f"tensor parallel style {style!r} of {(matches + parameters)[0]} in {type(module).__name__}",
                f"styles are {', '.join(sorted(STYLES))}, each of a module",
                "parallel.tensor=1, or initialize(tensor_plan={pattern: style}) with these styles",
            )
        if not matches and plan is not None and whole:
            raise ModelError(
                f"tensor_plan pattern {pattern!r} matches no module of {type(module).__name__}",
                "a pattern is a module's name, * for one part of it",
                f"one of: {', '.join(sorted(names)[:8])}",
            )
        styles.update(dict.fromkeys(matches, style))
    return styles


def _own_table(module: nn.Module) -> Mapping[str, str]:
    """The model's own plan, over names from the root."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):  # Hugging Face's: a head's entry alone is no plan
        base = any(getattr(getattr(m, "config", None), "base_model_tp_plan", None) for m in module.modules())
        table = getattr(module, "_tp_plan", None) if base else None
    else:
        table = getattr(module, "base_model_tp_plan", None)
    if not table:
        raise ModelError(
            f"{type(module).__name__} has no tensor parallel plan",
            "parallel.tensor > 1 needs a table of which layers are cut how: the model's base_model_tp_plan, or the caller's",
            "parallel.tensor=1, or initialize(tensor_plan={'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'})",
        )
    found: Mapping[str, str] = table
    return found


def _with_tied(module: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """A head and an embedding that share their weight are cut alike: by the vocabulary."""
    holders: dict[int, list[str]] = {}
    for name, owner in module.named_modules():
        weight = owner._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(name)
    modules, found = dict(module.named_modules()), dict(styles)
    for names in holders.values():
        if len(names) > 1 and any(styles.get(n) in (EMBEDDING, *COLUMN) for n in names):
            for name in names:
                usual = EMBEDDING if isinstance(modules[name], nn.Embedding) else "colwise_gather_output"
                found.setdefault(name, usual)
    return found


def _check(model: nn.Module, name: str, style: str, mesh: Mesh) -> None:
    """Raises ModelError where a module can't be cut in this style."""
    module, size = model.get_submodule(name), mesh.degrees.tensor
    if style == EMBEDDING:
        odd = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, o, None)]
        if not isinstance(module, nn.Embedding) or odd:
            raise ModelError(
                f"{name}: {type(module).__name__}{' with ' + odd[0] if odd else ''} in style {style}",
                "an nn.Embedding without max_norm, scale_grad_by_freq and sparse is cut by rows",
                f"leave {name} out of the plan",
            )
        _check_vocabulary(name, module.num_embeddings, module.embedding_dim, mesh)
        return
    if style not in COLUMN | ROW:
        return
    sizes = features(module)
    if sizes is None:
        raise ModelError(
            f"{name}: {type(module).__name__} in style {style}",
            "linear layers (nn.Linear, Hugging Face's Conv1D) are cut by columns and rows",
            f"leave {name} out of the plan",
        )
    if style in ("colwise", "rowwise"):
        _check_heads(model, name, size)
    width, what = (sizes[0], "outputs") if style in COLUMN else (sizes[1], "inputs")
    if style in GATHERED:
        _check_vocabulary(name, *sizes, mesh)
    elif width % size:
        raise _does_not_divide(name, width, what, size)


def _check_vocabulary(name: str, rows: int, width: int, mesh: Mesh) -> None:
    """Rows may be uneven; ZeRO then shards the columns (`zero._dimension`)."""
    size, shards = mesh.degrees.tensor, mesh.parameters.size(-1)
    if rows % size and width % shards:
        raise ModelError(
            f"{name}: {rows} x {width} on parallel.tensor={size} x {shards} sharding ranks",
            "parallel.tensor divides the vocabulary, or the sharding ranks the width",
            f"a vocabulary of {-(-rows // size) * size}, or parallel.tensor={math.gcd(rows, size)}",
        )


def _check_heads(model: nn.Module, name: str, size: int) -> None:
    """Heads are not cut through: the attention that `name` belongs to has a multiple of `size` of each kind."""
    parent = model.get_submodule(name.rpartition(".")[0])
    source: Any = getattr(parent, "settings", None) or getattr(parent, "config", None)
    head_dim = getattr(parent, "head_dim", None) or getattr(getattr(parent, "settings", None), "head_dim", None)
    if not isinstance(head_dim, int):
        return  # no attention
    for fields, what in (
        (("heads", "num_attention_heads"), "heads"),
        (("kv_heads", "num_key_value_heads"), "kv_heads"),
    ):
        count = next((getattr(source, f) for f in fields if isinstance(getattr(source, f, None), int)), None)
        if count is not None and count % size:
            raise _does_not_divide(name, count, what, size)


def _does_not_divide(name: str, count: int, what: str, size: int) -> ModelError:
    fits = [n for n in range(1, size) if count % n == 0]
    return ModelError(
        f"{name}: {count} {what} on parallel.tensor={size} ranks",
        f"parallel.tensor divides the {what} of every layer that is cut",
        f"parallel.tensor={fits[-1]}",
    )


def _cut_parameters(module: nn.Module, styles: Mapping[str, str], cutting: Cutting) -> None:
    """Every parameter as a DTensor, tied ones once."""
    cut: dict[int, nn.Parameter] = {}
    for name, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in cut:
                place = placement(owner, key, styles.get(name))
                cut[id(parameter)] = cut_parameter(parameter, place, cutting)
            setattr(owner, key, cut[id(parameter)])
