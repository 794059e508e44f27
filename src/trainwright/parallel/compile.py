"""torch.compile, unit by unit: blocks that are alike share what is compiled for the first of them.

Only a unit's forward is compiled: FSDP's hooks stay around it. A unit that cannot be compiled runs as it is, which is
said once; the numbers are the same to rounding.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from trainwright.config import Config
from trainwright.fused.linear import widens
from trainwright.parallel.units import find_units
from trainwright.precision.policy import DTYPES
from trainwright.torch_private import cpu_bf16_is_fast
from trainwright.torch_private.compiler import (
    compile_errors,
    compiled_graphs,
    quiet_about_gradients,
    share_graphs_between_layers,
    widen_again_in_backward,
)

WORTH_FLOP = 2e14
"""Training that takes less is over before compiling (about half a minute on a CPU) has paid."""


def compiles(
    config: Config, module: nn.Module, shard_units: Sequence[str | type[nn.Module]] | None, device: torch.device
) -> bool:
    """Whether blocks are compiled: the config's word, or for `auto` where they can be and it pays."""
    if config.compile != "auto":
        return config.compile
    splits_backward = config.parallel.pipeline > 1 and config.parallel.pipeline_schedule in ("zero_bubble", "zbv")
    if splits_backward or not find_units(module, shard_units):
        return False
    size = config.batch.global_size or (config.batch.global_tokens or 0) // config.data.sequence_length
    tokens = config.tokens or (config.steps or 0) * size * config.data.sequence_length
    parameters = sum(p.numel() for p in module.parameters())
    return worth_compiling(device, DTYPES[config.precision.dtype], 6.0 * tokens * parameters)


def worth_compiling(device: torch.device, compute: torch.dtype, flop: float) -> bool:
    """`compile: auto`. flop: of the whole run; 0 where its length is not known.

    On GPUs always. On CPUs in bf16 where products are fast, so that what lies between them counts, and the run is long:
    with AVX2's products a step is little more than these (docs/benchmarks.md).
    """
    if device.type == "cuda":
        return True
    fast = cpu_bf16_is_fast() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return compute == torch.bfloat16 and fast and flop >= WORTH_FLOP


def apply_compile(units: Sequence[tuple[str, nn.Module]], compute: torch.dtype, device: torch.device) -> None:
    """Compiles the forward of each unit, in place; names of parameters stay. compute: the format of its products."""
    share_graphs_between_layers()
    quiet_about_gradients()
    if widens(torch.empty(0, dtype=compute, device=device)):
        widen_again_in_backward()
    for name, unit in units:
        unit.forward = _Compiled(name, unit.forward)


class _Compiled:
    """A unit's forward, compiled at its first call in training; the plain one from then on where that fails.

    Without gradients the plain one runs: generation has other shapes at every token.
    """

    failed = False
    """Of the process: what one unit cannot, the others are not tried for."""

    def __init__(self, name: str, forward: Callable[..., Any]) -> None:
        self._name, self._plain = name, forward
        self._compiled: Callable[..., Any] = torch.compile(forward)
        functools.update_wrapper(self, forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the unit computes with its own weights, as it is."""
        plain: Callable[..., Any] = copy.deepcopy(self._plain, memo)
        return plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _Compiled.failed or not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except compile_errors() as error:  # named when there is one: it imports the compiler
            _Compiled.failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(
                f"{self._name} cannot be compiled and runs without ({reason[:300]}); compile=false leaves this out",
                stacklevel=2,
            )
            return self._plain(*args, **kwargs)


class CompileWatch:
    """Tells of compilations after the warm-up: each costs seconds, and a run that goes on with them crawls."""

    def __init__(self, warm_up_steps: int = 3) -> None:
        self._steps_left = warm_up_steps
        self._before = 0
        self._said = False

    def begin(self) -> None:
        """Before a training step (evaluation compiles for itself)."""
        self._before = compiled_graphs()

    def end(self, step: int) -> str | None:
        """After it; what there is to say, once."""
        new = compiled_graphs() - self._before
        self._steps_left -= 1
        if self._steps_left >= 0 or not new or self._said:
            return None
        self._said = True
        return (
            f"step {step}: {new} graph(s) compiled anew after the warm-up, for an input of another shape or kind; "
            "TORCH_LOGS=recompiles tells which (said once)"
        )
