"""Builds a model without its memory, and remembers how each parameter would have been initialised.

`build_on_meta(build)` runs the constructor unchanged. Every parameter goes to the meta device the moment it is
registered; buffers stay real, so that tables computed in a constructor are right. Each operation on a parameter
(`normal_`, `weight[pad].zero_()`, a scaled second pass, ...) is written on a tape, and from the tape each parameter
gets a `Recipe` by which any rows of its initial values can be made later, on any rank (`checkpoint/weights.py`).
Nothing in a recipe refers to a rank. Values that a constructor draws itself (`Parameter(torch.randn(n))`) are kept
whole in host memory, drawn with the same seed on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from trainwright.errors import ModelError
from trainwright.models.recipe import Recipe, Step, View
from trainwright.torch_private import TorchDispatchMode, tree_leaves, tree_map_only

_RECIPES = "trainwright_recipes"
_LARGE_BYTES = 1 << 28
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


def build_on_meta(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module of `build()`, its parameters on the meta device, with the recipes of their initial values.

    Errors: ModelError when the constructor needs the values of its parameters, which do not exist yet.
    """
    tape = _Tape()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _parameters_to_meta(tape), _InitCalls(tape), tape:
                module = build()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            raise ModelError(
                f"the model's constructor reads its parameters' values ({str(error).splitlines()[0]})",
                "a callable is built on the meta device, where parameters have no values yet",
                "pass the module itself instead of a callable: initialize(model=build(), ...)",
            ) from error
    for name, parameter in module.named_parameters():
        assert parameter.is_meta, f"{name} escaped to {parameter.device}"
    object.__setattr__(module, _RECIPES, tape.recipes(module))
    return module


def recipes_of(module: nn.Module) -> dict[str, Recipe]:
    """Recipes by name of the parameters (and meta buffers) of a module of `build_on_meta`; empty for any other."""
    return getattr(module, _RECIPES, {})


class _Tape(TorchDispatchMode):
    """Writes down every operation that creates or changes a tensor on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.first_values: dict[int, float | Tensor] = {}
        self._storages: dict[int, tuple[int, Any]] = {}  # by id, kept alive here so that ids stay unique
        self._sizes: dict[int, int] = {}
        self._unwritten: dict[int, Tensor] = {}  # real tensors of torch.empty, by address, nothing written yet

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and _is_large(args, kwargs):
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = func(*args, **kwargs)
        self.note(func, args, kwargs, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        written = _written(func, args, kwargs)
        creates = "empty" in func.overloadpacket.__name__
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in written:
            if not tensor.is_meta:
                self._unwritten.pop(tensor.untyped_storage().data_ptr(), None)
        if creates:
            for tensor in results:
                if not tensor.is_meta and tensor.numel():
                    self._unwritten[tensor.untyped_storage().data_ptr()] = tensor
            return
        known = {self._number(tensor) for tensor in inputs if tensor.is_meta}
        fresh = [tensor for tensor in results if tensor.is_meta and self._number(tensor) not in known]
        changed = [tensor for tensor in written if tensor.is_meta]
        if changed or fresh:
            self.record(func, args, kwargs, changed, fresh)

    def record(
        self, function: Any, args: Any, kwargs: dict[str, Any], changed: list[Tensor], fresh: list[Tensor]
    ) -> None:
        def describe(tensor: Tensor) -> View | Tensor:
            return self.view(tensor) if tensor.is_meta else tensor.detach().clone()

        kwargs = {
            key: torch.device("cpu") if isinstance(value, torch.device) else value
            for key, value in kwargs.items()
            if key != "generator"  # the recipe's own draws
        }
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        described = tree_map_only(Tensor, describe, (tuple(args), kwargs))
        self.steps.append(
            Step(
                function,
                described[0],
                described[1],
                reads=frozenset(self._number(tensor) for tensor in tensors),
                writes=frozenset(self._number(tensor) for tensor in [*changed, *fresh]),
                outs=tuple(self.view(tensor) for tensor in fresh),
            )
        )

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            number = len(self._storages)
            self._storages[id(storage)] = (number, storage)
            self._sizes[number] = storage.nbytes() // tensor.dtype.itemsize
        return self._storages[id(storage)][0]

    def view(self, tensor: Tensor) -> View:
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        return View(self._number(tensor), size, stride, int(tensor.storage_offset()), tensor.dtype)

    def take_value(self, real: Tensor, meta: Tensor) -> None:
        """Keeps what a parameter already holds when it is registered, unless that is untouched memory."""
        number = self._number(meta)
        if real.numel() == 0:
            self.first_values[number] = 0.0
        elif self._unwritten.pop(real.untyped_storage().data_ptr(), None) is None:
            first = real.detach().reshape(-1)[0]
            constant = bool((real.detach() == first).all())
            self.first_values[number] = float(first) if constant else real.detach().clone().contiguous()

    def recipes(self, module: nn.Module) -> dict[str, Recipe]:
        """A recipe for each parameter, and for each buffer that ended on the meta device."""
        tensors: dict[str, Tensor] = dict(module.named_parameters())
        tensors |= {name: buffer for name, buffer in module.named_buffers() if buffer.is_meta}
        writers: dict[int, list[int]] = {}
        for order, step in enumerate(self.steps):
            for number in step.writes:
                writers.setdefault(number, []).append(order)
        closures = {name: self._closure(self._number(tensor), writers) for name, tensor in tensors.items()}
        users: dict[int, int] = {}
        for numbers, _ in closures.values():
            for number in numbers:
                users[number] = users.get(number, 0) + 1
        return {
            name: Recipe(
                view=self.view(tensors[name]),
                first_values={n: self.first_values[n] for n in numbers if n in self.first_values},
                steps=tuple(self.steps[order] for order in orders),
                order=orders,
                sizes={number: self._sizes[number] for number in numbers},
                # A tensor that another one was copied from must draw as that copy does: both are replayed whole.
                shared=any(users[number] > 1 for number in numbers),
            )
            for name, (numbers, orders) in closures.items()
        }

    def _closure(self, target: int, writers: dict[int, list[int]]) -> tuple[set[int], tuple[int, ...]]:
        """The storages and steps that `target` depends on."""
        numbers, orders, open_numbers = {target}, set[int](), [target]
        while open_numbers:
            for order in writers.get(open_numbers.pop(), []):
                if order in orders:
                    continue
                orders.add(order)
                new = (self.steps[order].reads | self.steps[order].writes) - numbers
                numbers |= new
                open_numbers.extend(new)
        return numbers, tuple(sorted(orders))


class _InitCalls(TorchFunctionMode):
    """Notes the functions of torch.nn.init that return at once for a meta tensor (trunc_normal_, orthogonal_, eye_,
    dirac_, sparse_): they ask `tensor.is_meta`, and that question is seen here, however the function was imported."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == _IS_META and result:
            frame = _init_frame(sys._getframe(1))
            if frame is not None:
                code = frame.f_code
                arguments = {name: frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]}
                self._tape.record(getattr(torch.nn.init, code.co_name), (), arguments, [args[0]], [])
        return result


def _init_frame(frame: FrameType | None, depth: int = 8) -> FrameType | None:
    """The call of a torch.nn.init function that asked: the caller, unless decorators stand in between."""
    while frame is not None and depth:
        if frame.f_code.co_filename == torch.nn.init.__file__:
            return frame
        frame, depth = frame.f_back, depth - 1
    return None


@contextmanager
def _parameters_to_meta(tape: _Tape) -> Iterator[None]:
    def on_registration(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta:
            return
        twin = type(parameter)(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        twin.__dict__.update(parameter.__dict__)
        tape.take_value(parameter, twin)
        # Not a replacement but a swap: whoever holds the parameter (a tie, a list of weights) holds it still.
        torch.utils.swap_tensors(parameter, twin)

    handle = register_module_parameter_registration_hook(on_registration)
    try:
        yield
    finally:
        handle.remove()


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator's schema says it writes to."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written


def _is_large(args: Any, kwargs: dict[str, Any]) -> bool:
    # Such an allocation may be refused although nobody would ever touch it.
    device = kwargs.get("device")
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    on_cpu = device is None or torch.device(device).type == "cpu"
    return on_cpu and torch.Size(args[0]).numel() * dtype.itemsize > _LARGE_BYTES
