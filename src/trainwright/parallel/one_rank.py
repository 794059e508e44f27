"""One rank alone: nothing to shard, gather or reduce, only formats to change.

FSDP2 on one rank would copy every parameter before its use, into memory of its own, and every gradient as it arrives. Here
parameters stay plain: forward and backward of their own format use them as they are; for a narrower one there are copies
of them, made anew once a step, and autograd takes each gradient back to the parameter's format as it arrives. Formats
meet where FSDP2's mixed precision has them meet: float inputs of a unit are cast, parameters of `keep_fp32` are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trainwright.mesh import Mesh
from trainwright.parallel.zero import ZeroFlags, ZeroSettings, kept_fp32
from trainwright.torch_private import after_backward

Slot = tuple[dict[str, Any], str]
"""Where a module keeps a parameter: its `_parameters`, and the name there."""


def alone(model: nn.Module, mesh: Mesh, settings: ZeroSettings) -> bool:
    """Whether parameters stay plain: this rank is the only one, holds them itself, and is to keep them whole."""
    held = mesh.device_mesh.size() == 1 and settings.stage < 3 and settings.offload_parameters == "none"
    wide = settings.policy.master == settings.policy.reduce
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())  # has lists of its weights besides
    return held and wide and not recurrent


class OneRank(ZeroFlags):
    """A model that one rank holds: no flags to set; formats are changed on the way where the policy asks for it."""

    def __init__(self, model: nn.Module, units: Sequence[tuple[str, nn.Module]], settings: ZeroSettings) -> None:
        super().__init__((), settings.stage)
        self._model = model
        self._compute, self._master = settings.policy.compute, settings.policy.master
        exact = kept_fp32(model, settings.keep_fp32)
        self._exact = frozenset(id(inside) for module in exact for inside in module.modules())
        self._slots: list[tuple[nn.Parameter, list[Slot]]] = []
        self._copies: list[Tensor] = []
        self._made_of: list[int] | None = None
        if self._compute == self._master:
            return
        for module in exact:
            module.register_forward_pre_hook(_casting(torch.float32), with_kwargs=True)
            module.register_forward_hook(lambda _m, _i, output, to=self._compute: _cast(output, to))
        for module in dict.fromkeys([*(module for _, module in units), model]):
            if id(module) not in self._exact:
                module.register_forward_pre_hook(_casting(self._compute), with_kwargs=True)
        model.register_forward_pre_hook(lambda *_: self._narrow())
        model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self._widen(), always_call=True)

    def begin(self, *, last: bool) -> None:
        """Nothing to set: no collectives."""

    def hold(self) -> None:
        """Nothing to hold back."""

    def reshard(self) -> None:
        """Before the parameters change: the copies are of the old values."""
        self._widen()
        self._made_of = None

    def _narrow(self) -> None:
        """Copies in the parameters' places, until backward (or a forward without one) is over."""
        if not self._slots:
            self._slots = self._find_slots()
            self._copies = [torch.empty_like(p, dtype=self._compute, requires_grad=False) for p, _ in self._slots]
        versions = [parameter._version for parameter, _ in self._slots]
        if versions != self._made_of and self._slots:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, [parameter.detach() for parameter, _ in self._slots])
            self._made_of = versions
        for (parameter, slots), narrow in zip(self._slots, self._copies, strict=True):
            stand_in = _StandIn.apply(parameter, narrow, self._widen) if parameter.requires_grad else narrow
            for place, name in slots:
                place[name] = stand_in

    def _widen(self) -> None:
        for parameter, slots in self._slots:
            for place, name in slots:
                place[name] = parameter

    def _find_slots(self) -> list[tuple[nn.Parameter, list[Slot]]]:
        found: dict[int, tuple[nn.Parameter, list[Slot]]] = {}
        for module in self._model.modules():
            if id(module) in self._exact:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype == self._master:
                    found.setdefault(id(parameter), (parameter, []))[1].append((module._parameters, name))
        return list(found.values())


class _StandIn(torch.autograd.Function):
    """A parameter's copy in another format, which takes the gradient back to the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, narrow: Tensor, over: Any) -> Tensor:
        ctx.dtype, ctx.over = parameter.dtype, over
        return narrow.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        after_backward(ctx.over)
        return gradient.to(ctx.dtype), None, None


def _casting(dtype: torch.dtype) -> Any:
    def cast_inputs(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, dtype), _cast(kwargs, dtype)

    return cast_inputs


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)
