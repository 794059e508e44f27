"""One rank alone: nothing to shard, gather or reduce, only formats to change.

FSDP2 on one rank would copy every parameter before its use, into memory of its own, and every gradient as it arrives. Here
parameters stay plain: forward and backward of their own format use them as they are; for a narrower one there are copies
of them, made anew once a step, and autograd takes each gradient back to the parameter's format as it arrives. Formats
meet where FSDP2's mixed precision has them meet: float inputs of a unit are cast, parameters of `keep_fp32` are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trainwright.mesh import Mesh
from trainwright.parallel.zero import ZeroFlags, ZeroSettings, kept_fp32
from trainwright.torch_private.autograd import after_backward

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

    plain = True

    def __init__(self, model: nn.Module, units: Sequence[tuple[str, nn.Module]], settings: ZeroSettings) -> None:
        super().__init__((), settings.stage)
        self._model = model
        self._compute, self._master = settings.policy.compute, settings.policy.master
        exact = kept_fp32(model, settings.keep_fp32)
        self._exact = frozenset(id(inside) for module in exact for inside in module.modules())
        self._held: list[_Held] = []
        self._last = True
        self._widens = False
        """Whether that has been asked for at the end of the backward under way."""
        if self._compute == self._master:
            return
        for module in exact:
            module.register_forward_pre_hook(_casting(torch.float32), with_kwargs=True)
            module.register_forward_hook(_Hook(lambda _m, _i, output, to=self._compute: _cast(output, to)))
        for module in dict.fromkeys([*(module for _, module in units), model]):
            if id(module) not in self._exact:
                module.register_forward_pre_hook(_casting(self._compute), with_kwargs=True)
        model.register_forward_pre_hook(_Hook(lambda *_: self._narrow()))
        model.register_forward_hook(_Hook(lambda *_: self._forward_over()), always_call=True)
        model.register_state_dict_pre_hook(_Hook(lambda *_: self._put_back()))
        model.register_load_state_dict_pre_hook(_Hook(lambda *_: self._put_back()))

    def begin(self, *, last: bool) -> None:
        """Before a backward, the step's last or not: in the last one copies go as they have been used."""
        self._last = last

    def hold(self) -> None:
        """Nothing to hold back."""

    def reshard(self) -> None:
        """Before the parameters change: the copies are of the old values."""
        for held in self._held:
            held.forget()

    def _narrow(self) -> None:
        """Copies in the parameters' places, until backward is over, or `reshard` after a forward without one."""
        if not self._held:
            self._held = self._find()
        self._widens = False  # a backward that failed has left it
        self._refresh([held for held in self._held if held.stale])
        for held in self._held:
            assert held.copy is not None, "made above"
            if not torch.is_grad_enabled() or not held.parameter.requires_grad:
                if not held.uses:  # else a backward is to come, which may look for what stands there
                    held.put(held.copy)
            else:
                held.put(_StandIn.apply(held.parameter, held.copy, weakref.ref(self), weakref.ref(held)))
                held.uses += 1

    def _forward_over(self) -> None:
        """After a forward without gradients there is no backward that would put the parameters back."""
        if not torch.is_grad_enabled():
            for held in self._held:
                if not held.uses:
                    held.put(held.parameter)

    def _refresh(self, stale: list[_Held]) -> None:
        if not stale:
            return
        with torch.inference_mode(False), torch.no_grad():
            copies = [torch.empty_like(held.parameter, dtype=self._compute, requires_grad=False) for held in stale]
            torch._foreach_copy_(copies, [held.parameter.detach() for held in stale])
        for held, copy in zip(stale, copies, strict=True):  # only now: memory may not have sufficed
            held.copy, held.version = copy, held.parameter._version

    def used(self, held: _Held) -> None:
        """Its gradient of one forward is there."""
        held.uses = max(0, held.uses - 1)
        if self._last and not held.uses:
            held.forget()
        if not self._widens:
            self._widens = True
            after_backward(self._widen)

    def _widen(self) -> None:
        """At the end of a backward; forwards whose backward is to come keep their copies."""
        self._widens = False
        for held in self._held:
            if not held.uses:
                held.put(held.parameter)

    def _put_back(self) -> None:
        for held in self._held:
            held.put(held.parameter)

    def _find(self) -> list[_Held]:
        found: dict[int, _Held] = {}
        for module in self._model.modules():
            if id(module) in self._exact:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype == self._master:
                    found.setdefault(id(parameter), _Held(parameter)).slots.append((module._parameters, name))
        return list(found.values())


@dataclass(eq=False)
class _Held:
    """A parameter, where modules keep it, and its copy in the compute format while there is one."""

    parameter: nn.Parameter
    slots: list[Slot] = field(default_factory=list)
    copy: Tensor | None = None
    version: int = 0
    """Of the values in the copy."""
    uses: int = 0
    """Forwards whose gradient has not come."""

    @property
    def stale(self) -> bool:
        """Whether there is no copy of the present values."""
        return self.copy is None or self.version != self.parameter._version

    def put(self, tensor: Tensor) -> None:
        """`tensor` where modules look for the parameter."""
        for place, name in self.slots:
            place[name] = tensor

    def forget(self) -> None:
        """Puts the parameter itself back and lets go of the copy."""
        self.put(self.parameter)
        self.copy, self.uses = None, 0


class _StandIn(torch.autograd.Function):
    """A parameter's copy in another format, which takes the gradient back to the parameter's.

    It knows its holder weakly: the model holds it, and Python's collector does not see through a graph.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, narrow: Tensor, holder: weakref.ref[OneRank], held: weakref.ref[_Held]
    ) -> Tensor:
        ctx.dtype, ctx.told = parameter.dtype, (holder, held)
        return narrow.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        holder, held = (reference() for reference in ctx.told)
        if holder is not None and held is not None:
            holder.used(held)
        return gradient.to(ctx.dtype), None, None, None


class _Hook:
    """A hook of one model: in a copy of it (`copy.deepcopy`, not between a forward and its backward), which computes in its
    parameters' own format, it does nothing."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return None if self._function is None else self._function(*args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)


def _casting(dtype: torch.dtype) -> _Hook:
    return _Hook(lambda _module, args, kwargs: (_cast(args, dtype), _cast(kwargs, dtype)))


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)
