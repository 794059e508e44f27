"""Cuts a model into pipeline parts, with its parameters' names unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainwright.config.schema import ParallelConfig
from trainwright.errors import ModelError
from trainwright.mesh import Mesh
from trainwright.parallel.pipeline.balance import Group, group_pieces
from trainwright.parallel.pipeline.layout import Forward, Layout, layout_of, shallow
from trainwright.parallel.pipeline.order import part_count, parts_of_rank

_PART = "trainwright_pipeline_part"


@dataclass
class PartOfModel:
    """What a part knows of the whole."""

    index: int
    count: int
    blocks: tuple[tuple[str, ...], ...]
    """Names of the blocks of every part."""
    pieces: tuple[str, ...]
    """Names of the modules that this part holds."""
    kind: type[nn.Module]
    """The model's class."""
    elsewhere: frozenset[str]
    """Names of the parameters and buffers that other parts hold."""
    shared: dict[str, tuple[int, ...]]
    """Tied weights in several parts: name -> those parts, ascending. The first one's stands for the others."""
    hidden: Tensor | None = None
    """What the part before gave, while a forward is under way."""

    def holders(self) -> set[str]:
        """Modules of other parts that stand here for a weight which this part shares."""
        return {name.rpartition(".")[0] for name, parts in self.shared.items() if self.index in parts[1:]}

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def part_of(module: nn.Module) -> PartOfModel | None:
    """What a module that `cut` gave knows of the whole; None for a model that is not cut."""
    found: PartOfModel | None = getattr(module, _PART, None)
    return found


def held_elsewhere(module: nn.Module) -> frozenset[str]:
    """Names that belong to the same model as `module` and that other pipeline parts hold."""
    part = part_of(module)
    return frozenset() if part is None else part.elsewhere


def cut(model: nn.Module, mesh: Mesh, settings: ParallelConfig, plan: Sequence[str] | None) -> list[nn.Module]:
    """This rank's parts, in the order of the forward; the model itself without pipeline parallelism.

    Parameters keep their names. A weight that is tied across parts is there in each of them under its first name.
    Modules are shared between `model` and the parts; the last part of this rank is `model` itself, cut down.
    Raises ModelError where the model cannot be cut, or not into so many parts.
    """
    ranks = mesh.degrees.pipeline
    if ranks == 1:
        return [model]
    layout = layout_of(model, plan)
    count = part_count(settings)
    groups = group_pieces(model, layout, count, settings)
    shared = _shared(model, groups)
    _check_trainable(model, groups, settings)
    mine = parts_of_rank(mesh.coordinate("pipeline"), settings)
    names = [name for name, _ in model.named_parameters()] + list(model.state_dict(keep_vars=True))
    copies = {(name, part): _copy(model, name) for name, parts in shared.items() for part in parts[1:] if part in mine}
    twins = [_skeleton(model, layout) for _ in mine[1:]] + [model]
    modules = [_part(twin, index, groups, layout, copies) for twin, index in zip(twins, mine, strict=True)]
    blocks = tuple(tuple(n for p in group for n in p.names if p.is_block) for group in groups)
    for module, index in zip(modules, mine, strict=True):
        elsewhere = frozenset(names) - set(module.state_dict(keep_vars=True))
        pieces = tuple(name for piece in groups[index] for name in piece.names)
        part = PartOfModel(index, count, blocks, pieces, type(model), elsewhere, shared)
        object.__setattr__(module, _PART, part)
        module.forward = _with_hidden(layout.forward(module, module.forward, part.is_last), part)
    return modules


def _with_hidden(forward: Forward, part: PartOfModel) -> Forward:
    """`part.hidden` travels beside the arguments: whoever calls the part passes a micro-batch, as to a whole model."""

    def with_hidden(*args: object, **kwargs: object) -> object:
        if part.hidden is None:
            assert part.is_first, "a later part runs on what the part before gave"
            return forward(*args, **kwargs)
        return forward(*args, hidden=part.hidden, **kwargs)

    return with_hidden


def joined(modules: Sequence[nn.Module]) -> nn.Module:
    """One module of the model's class with all that these parts hold, under its names: for looking at, and for train()
    and eval(). It has no forward of its own."""
    if len(modules) == 1:
        return modules[0]
    first = part_of(modules[0])
    assert first is not None, "parts of a cut model"
    view: nn.Module = object.__new__(first.kind)  # a sharded module's own class cannot be copied
    vars(view).update(vars(modules[0]))
    vars(view)["_modules"] = dict(modules[0]._modules)
    own = set(first.pieces) | first.holders()
    others = [(module, part) for module in modules[1:] if (part := part_of(module)) is not None]
    own_containers(view, [name for _, part in others for name in part.pieces])
    for module, part in others:
        # Of a weight of which two parts hold copies, the first stands for both.
        for name in {*part.pieces, *part.holders()} - own:
            owner, _, leaf = name.rpartition(".")
            view.get_submodule(owner)._modules[leaf] = module.get_submodule(name)
        own |= {*part.pieces, *part.holders()}

    def train(mode: bool = True) -> nn.Module:
        for module in modules:
            module.train(mode)
        view.training = mode
        return view

    vars(view)["train"] = train
    return view


# --- the part itself -----------------------------------------------------------------------------------------------


def _shared(model: nn.Module, groups: list[Group]) -> dict[str, tuple[int, ...]]:
    """Tied weights that lie in several parts: first name -> parts. Raises ModelError for a parameter in no piece."""
    part_by_name = {name: index for index, group in enumerate(groups) for piece in group for name in piece.names}
    names: dict[int, list[str]] = {}
    parts: dict[int, set[int]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((name for name in part_by_name if full.startswith(name + ".")), None)
        if owner is None:
            raise ModelError(
                f"parallel.pipeline > 1: parameter {full} of {type(model).__name__} lies in none of the modules that the "
                "forward passes through",
                "every parameter lies in one part of the pipeline",
                "a pipeline_plan that names its module, or parallel.pipeline=1",
            )
        names.setdefault(id(parameter), []).append(full)
        parts.setdefault(id(parameter), set()).add(part_by_name[owner])
    shared = {names[key][0]: tuple(sorted(held)) for key, held in parts.items() if len(held) > 1}
    for name, held in shared.items():
        module = name.rpartition(".")[0]
        if part_by_name.get(module) != held[0]:
            raise ModelError(
                f"parallel.pipeline > 1: {name} is shared by blocks of different parts",
                "a weight is shared with the embedding, by its head, or by modules of one part",
                "parallel.pipeline=1, or untied weights",
            )
    return shared


def _check_trainable(model: nn.Module, groups: list[Group], settings: ParallelConfig) -> None:
    for index, group in enumerate(groups):
        names = [name for piece in group for name in piece.names]
        if not any(p.requires_grad for name in names for p in model.get_submodule(name).parameters()):
            raise ModelError(
                f"freeze leaves nothing to train in part {index} of {len(groups)}: {', '.join(names)}",
                "every part of a pipeline trains something",
                f"parallel.pipeline={max(1, settings.pipeline // 2)}, or 1",
            )


def _copy(model: nn.Module, name: str) -> nn.Parameter:
    """Another parameter with the same values (none, on the meta device)."""
    parameter = model.get_parameter(name)
    with torch.no_grad():
        return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _skeleton(model: nn.Module, layout: Layout) -> nn.Module:
    """A copy of the containers that hold the pieces; the pieces themselves are shared."""
    twin = shallow(model)
    own_containers(twin, [name for piece in layout.pieces for name in piece.names])
    return twin


def own_containers(module: nn.Module, names: Sequence[str]) -> None:
    """Copies, in place, of the modules on the way from `module` to those named, so that these can be replaced."""
    done: set[str] = set()
    for name in names:
        steps = name.split(".")[:-1]
        for depth, step in enumerate(steps):
            path = ".".join(steps[: depth + 1])
            if path not in done:
                owner = module.get_submodule(".".join(steps[:depth]))
                owner._modules[step] = shallow(owner.get_submodule(step))
                done.add(path)


def _part(
    module: nn.Module,
    index: int,
    groups: list[Group],
    layout: Layout,
    copies: dict[tuple[str, int], nn.Parameter],
) -> nn.Module:
    """`module` with the pieces of other parts replaced by their stand-ins."""
    originals = {name: module.get_parameter(name) for name, part in copies if part == index}
    for other, group in enumerate(groups):
        for name in (name for piece in group for name in piece.names):
            if other != index:
                owner, _, leaf = name.rpartition(".")
                absent = module.get_submodule(name)
                held = [full for full in originals if full.rpartition(".")[0] == name]
                stand_in = layout.holder(absent) if held else layout.stand_ins[name](absent)
                for full in held:
                    assert stand_in is not None, f"{name} holds {full}"
                    stand_in._parameters[full.rpartition(".")[2]] = originals[full]
                module.get_submodule(owner)._modules[leaf] = stand_in
    for inner in module.modules():
        for key, value in inner._parameters.items():
            for full, original in originals.items():
                if value is original:
                    inner._parameters[key] = copies[full, index]
    return module
