"""Activation recomputation: drop what a block keeps for backward and make it again there (arXiv 1604.06174).

full: a block keeps its input alone. selective: also the results of its matrix products and of attention, the dear ones
(arXiv 2205.05198); norms, activations and element-wise products run twice.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainwright.config.schema import RecomputeConfig
from trainwright.fused.attention import WIDE_ATTENTION
from trainwright.fused.linear import WIDE_LINEAR, results_kept
from trainwright.fused.product_attention import PRODUCT_ATTENTION
from trainwright.models.sequence import SequenceSlice, active_slice, sequence_slice
from trainwright.torch_private import function_modes

# Operators whose results selective recomputation keeps: products, attention, and what ranks have sent each other.
_DEAR_NAMES = {
    "aten": (
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "linear",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
    ),
    # Gathers are left out: their results are the largest, and sequence parallelism is there to keep them small.
    "_c10d_functional": ("all_to_all_single", "all_reduce", "reduce_scatter_tensor"),
}
_DEAR = frozenset(
    getattr(space, name).default
    for space, names in ((getattr(torch.ops, key), value) for key, value in _DEAR_NAMES.items())
    for name in names
    if hasattr(space, name)
) | {WIDE_LINEAR, WIDE_ATTENTION, PRODUCT_ATTENTION}


# Hugging Face's blocks write keys and values into it: running again they would find their own, or write them twice.
_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past"})


def apply_recompute(units: Sequence[tuple[str, nn.Module]], settings: RecomputeConfig) -> None:
    """Every `settings.every`-th unit's forward under `checkpoint` while training.

    The module's forward is replaced, not wrapped in another module, so that parameter names stay what they are.
    """
    if settings.mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    selective = settings.mode == "selective"
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_the_dear)
    for _, module in units[:: settings.every]:
        original = module.forward
        # A partial, not a closure: a deep copy of the module recomputes with its own weights.
        forward = functools.partial(_forward, module, original, options)
        module.forward = functools.update_wrapper(forward, original)


def _forward(
    module: nn.Module, original: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """`module`'s forward, run again in backward. options: of `checkpoint`."""
    if not (module.training and torch.is_grad_enabled()):
        return original(*args, **kwargs)
    for name in _CACHES & kwargs.keys():
        kwargs[name] = None
    surroundings = _Surroundings.now()
    # A captured step draws nothing (`captured.py`), and generators cannot be asked inside it.
    capturing = not torch.compiler.is_compiling() and torch.cuda.is_initialized()
    captured = capturing and torch.cuda.is_current_stream_capturing()
    again = functools.partial(surroundings.run, original) if surroundings.any else original
    with results_kept() if "context_fn" in options else contextlib.nullcontext():
        return checkpoint(again, *args, preserve_rng_state=not captured, **options, **kwargs)


@dataclass(frozen=True)
class _Surroundings:
    """What a forward depends on beside its arguments: it runs again in backward, where nothing of it is there, or
    another micro-batch's is."""

    place: SequenceSlice | None
    modes: tuple[Any, ...]

    @classmethod
    def now(cls) -> _Surroundings:
        modes = () if torch.compiler.is_compiling() else function_modes()
        return cls(active_slice(), modes)

    @property
    def any(self) -> bool:
        return self.place is not None or bool(self.modes)

    def run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if function_modes() != self.modes:
                for mode in self.modes:
                    stack.enter_context(mode)
            stack.enter_context(sequence_slice(self.place))
            return forward(*args, **kwargs)


def _keep_the_dear(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
