"""The exchange of one unit behind the computation of the next, where it goes from rank to rank directly (`exchange.py`).

A unit's gradients are sent as its backward ends and added up when the next unit's has ended; parameters are asked for one
unit ahead of their forward. Gradients that 16-bit weights have are sent as they are and added up in fp32: what is sent in
fp32 has the same values. NCCL's collectives overlap by streams, without this.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from trainwright import exchange
from trainwright.mesh import Mesh
from trainwright.precision.policy import Policy
from trainwright.torch_private import gather_without_waiting
from trainwright.torch_private.autograd import after_backward


class Overlap:
    """Of one model: its reduce-scatter under way, at most one, and the format it is sent in.

    A gradient may be filled late where nothing reads it before the backward is over: it is neither added to an earlier
    one nor cast nor copied elsewhere, and no optimizer runs in backward. Elsewhere every reduction is waited for.
    """

    def __init__(self, mesh: Mesh, policy: Policy, offloaded: bool) -> None:
        direct = mesh.parameters.ndim == 1 and exchange.hides(mesh.device, mesh.parameters.get_group())
        self._late = direct and policy.reduce == policy.master and not offloaded
        narrows = direct and policy.reduce == torch.float32 and policy.compute.itemsize == 2
        self._narrow = policy.compute if narrows else None
        self._parameters: tuple[nn.Parameter, ...] = ()
        self._nodes: list[Any] = []
        """Of autograd, which add gradients to `_parameters`. They live as long as somebody holds them."""
        self._allowed = False
        self._whole_gradients = True
        self._reduces: str | None = None
        self._reduced: set[str] = set()
        self._pending: dist.Work | None = None

    def watch(self, model: nn.Module) -> None:
        """Keeps the sharded parameters in mind, once they are what the optimizer sees."""
        self._parameters = tuple(p for p in model.parameters() if p.requires_grad)
        if not self._late:
            return
        own = weakref.ref(self)  # Python's collector does not see through a node

        def wait(_: Any) -> None:
            if (overlap := own()) is not None:
                overlap._add_to_reduced()

        self._nodes = [get_gradient_edge(p).node for p in self._parameters]
        for node in self._nodes:
            node.register_prehook(wait)

    def begin(self, adds_up_whole: bool) -> None:
        """Before a backward from which gradients are to come. adds_up_whole: to those of earlier micro-batches, in fp32,
        before they are reduced."""
        self.settle()
        self._whole_gradients, self._reduces = adds_up_whole, None
        self._reduced.clear()
        self._allowed = self._late and all(_fresh(p) for p in self._parameters)

    def hold(self) -> None:
        """Before a backward in which every reduction is waited for."""
        self.settle()
        self._allowed, self._whole_gradients, self._reduces = False, True, None

    def memory_format(self, unit: str, dtype: torch.dtype) -> torch.dtype:
        """What FSDP's memory for a reduce-scatter in `dtype` is to hold: it asks for the input's, then for the output's."""
        first, self._reduces = self._reduces != unit, unit if self._reduces != unit else None
        return self._narrow if first and self._narrow is not None and not self._whole_gradients else dtype

    def reduce_scatter(self, unit: str, output: Tensor, input: Tensor, group: Any, op: Any) -> Any:
        """As `exchange.reduce_scatter`; `output` may be filled when the next unit's begins, or the backward ends."""
        if self._pending is None and self._allowed:
            after_backward(self.hold)
        self.settle()
        again = unit in self._reduced  # used twice in forward: this one is added to what the first gave
        self._reduced.add(unit)
        late = self._allowed and not again and op == dist.ReduceOp.SUM
        work = exchange.reduce_scatter(output, input, group, op, async_op=late)
        if late:
            self._pending = work
        return None if late else work

    def _add_to_reduced(self) -> None:
        """A gradient that no reduction brings: of a penalty on the sharded parameters themselves. It is added to what has been
        reduced, or the other way round."""
        self.settle()
        self._allowed = False

    def settle(self) -> None:
        """Fills the gradients that are still missing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()


def _fresh(parameter: nn.Parameter) -> bool:
    """Whether its gradient will be neither added to one that is there nor read by a hook in backward."""
    return parameter.grad is None and not getattr(parameter, "_post_accumulate_grad_hooks", None)


def gather_ahead(model: nn.Module, units: Sequence[nn.Module], mesh: Mesh) -> None:
    """Has each unit's forward ask for the next one's parameters first. `units`: sharded, in the order of forward."""
    if mesh.device.type != "cpu":
        return
    gather_without_waiting(model)
    for module, following in itertools.pairwise([model, *(unit for unit in units if unit is not model)]):
        assert isinstance(module, FSDPModule)
        assert isinstance(following, FSDPModule)
        module.set_modules_to_forward_prefetch([following])
