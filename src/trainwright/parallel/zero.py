"""ZeRO stages as settings of FSDP2's `fully_shard` (arXiv 1910.02054; docs/concepts.md has the table).

| stage | mesh | after forward | between micro-batches |
|---|---|---|---|
| 0 | (replicate N, shard 1) | parameters kept whole | whole gradients accumulate; reduced at the last |
| 1 | shard | kept whole | the same |
| 2 | shard | kept whole | reduce-scattered every micro-batch |
| 3 | shard | resharded | reduce-scattered every micro-batch |

All division is ours (`normaliser.py`): reductions are plain sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from trainwright.errors import ModelError
from trainwright.mesh import Mesh
from trainwright.parallel.overlap import Overlap
from trainwright.parallel.pipeline.cut import held_elsewhere
from trainwright.precision.policy import Policy
from trainwright.torch_private import forget_forwards


@dataclass(frozen=True)
class ZeroSettings:
    """What `shard` needs beyond the model."""

    stage: int
    policy: Policy
    keep_fp32: tuple[str, ...] = ()
    offload_parameters: Literal["none", "cpu", "disk"] = "none"


def shard(
    model: nn.Module, units: Sequence[tuple[str, nn.Module]], mesh: Mesh, settings: ZeroSettings
) -> list[FSDPModule]:
    """Shards `model` in place, unit by unit, the root last. Returns its FSDP modules, the root last."""
    policy = settings.policy
    mixed = _mixed(policy, policy.compute)
    offload = OffloadPolicy()
    if settings.offload_parameters != "none":  # a pinned copy of a file's pages would be one in memory
        pinned = mesh.device.type == "cuda" and settings.offload_parameters == "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned)
    common: dict[str, Any] = {"mesh": mesh.parameters, "offload_policy": offload, "shard_placement_fn": _dimension}
    reshard = settings.stage == 3
    modules: list[FSDPModule] = []
    for module in kept_fp32(model, settings.keep_fp32):
        # A unit of its own, whose inputs are cast up and whose outputs are cast back.
        exact = MixedPrecisionPolicy(
            param_dtype=torch.float32, reduce_dtype=policy.reduce, output_dtype=policy.compute, cast_forward_inputs=True
        )
        modules.append(fully_shard(module, mp_policy=exact, reshard_after_forward=reshard, **common))
    for _, module in units:
        if isinstance(module, FSDPModule):
            continue
        modules.append(fully_shard(module, mp_policy=mixed, reshard_after_forward=reshard, **common))
    # The root's parameters are needed again right at the start of backward: never resharded in between.
    if not isinstance(model, FSDPModule):
        fully_shard(model, mp_policy=mixed, reshard_after_forward=False, **common)
        modules.append(model)  # type: ignore[arg-type]
    for sharded in modules:
        sharded.set_force_sum_reduction_for_comms(True)
        if mesh.parameters.size() > 1:
            sharded.set_gradient_divide_factor(1.0)  # on one rank FSDP divides by nothing, where 1.0 costs a pass
        if mesh.parameters.size(-1) == 1:
            sharded.set_custom_reduce_scatter(_one_shard)  # type: ignore[arg-type]
    return modules


class _OneShard:
    """Memory of a reduce-scatter over one rank, whose output is its input: FSDP asks for the input, then for the output,
    and copies one to the other where they are two."""

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The input's memory; at the second call the same as the output's."""
        held, self._input = self._input, None
        if held is not None and held.shape == torch.Size(size) and held.dtype == dtype:
            return held
        self._input = torch.empty(size, dtype=dtype, device=device)
        return self._input

    def __call__(self, *_: Any, **__: Any) -> None:
        """Never asked: FSDP calls no collective for one rank."""
        raise AssertionError("a reduce-scatter over one rank")

    def forget(self) -> None:
        """Before a backward: the one before may have ended between the two calls."""
        self._input = None


_one_shard = _OneShard()


def _dimension(parameter: nn.Parameter) -> Shard | None:
    """Rows are sharded (None); of rows that tensor ranks hold unevenly (a vocabulary) the columns: DTensor has no
    placement for uneven parts of uneven parts."""
    if isinstance(parameter, DTensor) and parameter.placements[0] == Shard(0):
        return Shard(1) if parameter.shape[0] % parameter.device_mesh.size() else None
    return None


def _mixed(policy: Policy, compute: torch.dtype) -> MixedPrecisionPolicy:
    # None leaves FSDP on its own path without casts where nothing differs from the masters.
    return MixedPrecisionPolicy(
        param_dtype=None if compute == policy.master else compute,
        reduce_dtype=None if policy.reduce == compute == policy.master else policy.reduce,
    )


def kept_fp32(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The outermost modules that match, each to be a unit of its own. Raises ModelError for those that cannot be one."""
    named = {name: m for name, m in model.named_modules() if name and any(True for _ in m.parameters())}
    names: list[str] = []
    for pattern in patterns:
        matches = [name for name in named if fnmatchcase(name, pattern)]
        if not matches and not held_elsewhere(model):  # of a pipeline part's model the whole has been looked at
            raise ModelError(
                f"keep_fp32 pattern {pattern!r} matches no module with parameters",
                "a pattern is matched against module names, * stands for anything",
                f"one of: {', '.join(list(named)[:8])}",
            )
        names.extend(matches)
    outermost = [n for n in dict.fromkeys(names) if not any(n.startswith(other + ".") for other in names)]
    for name in outermost:
        inside = {id(p) for p in named[name].parameters()}
        outside = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(name + ".")}
        if isinstance(named[name], nn.ModuleList | nn.ModuleDict) or inside & outside:
            why = "is a list of modules" if not inside & outside else "shares a weight with another module (tied)"
            raise ModelError(
                f"keep_fp32: {name} {why}",
                "a module that computes in fp32 has a forward and weights of its own",
                f"keep_fp32: ['{name}.*']" if not inside & outside else "an untied model, or another module",
            )
    return [named[name] for name in outermost]


class ZeroFlags:
    """Sets FSDP's flags for each micro-batch, so that a stage does what the table above says."""

    plain = False
    """Whether the parameters are the model's own tensors, which nothing gathers or reduces."""

    def __init__(self, modules: Sequence[FSDPModule], stage: int, overlap: Overlap | None = None) -> None:
        self._modules = tuple(modules)
        self._stage = stage
        self._overlap = overlap
        self._last: bool | None = None

    @property
    def reduces_every_micro_batch(self) -> bool:
        """Whether gradients lie sharded while micro-batches accumulate."""
        return self._stage >= 2

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the backward of micro-batch `index` of `count`."""
        self.begin(last=index == count - 1)
        if self._overlap is not None:
            self._overlap.begin(adds_up_whole=count > 1 and not self.reduces_every_micro_batch)

    def begin(self, *, last: bool) -> None:
        """Before a backward, the step's last or not."""
        _one_shard.forget()
        if self._overlap is not None:
            self._overlap.hold()
        if last == self._last:
            return
        self._last = last
        self._modules[-1].set_is_last_backward(last)
        for module in self._modules:
            module.set_requires_gradient_sync(last or self.reduces_every_micro_batch, recurse=False)
            # Stage 3 gives parameters back every time; the others keep them whole until the last backward.
            module.set_reshard_after_backward(last or self._stage == 3, recurse=False)

    def hold(self) -> None:
        """Before the half of a backward that makes no gradients of weights: parameters stay, nothing is reduced."""
        _one_shard.forget()
        if self._overlap is not None:
            self._overlap.hold()
        self._last = None
        self._modules[-1].set_is_last_backward(False)
        for module in self._modules:
            module.set_requires_gradient_sync(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)

    def reshard(self) -> None:
        """Frees whole parameters that a forward without backward (evaluation) left behind."""
        for module in self._modules:
            module.reshard()
        forget_forwards(self._modules[-1])
