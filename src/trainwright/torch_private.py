"""The one home of names that torch keeps private.

Each name: the versions it was checked on, why it is needed, and what to do when it goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

# Checked on 2.13 (CPU). Which rows of a DTensor this rank holds: used to read slices of weight files and to draw
# initial values block by block. When it goes: compute it from mesh coordinate and torch.chunk's rule for Shard(0).
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Checked on 2.13. Writes down the operations of a model's constructor on its parameters (models/deferred.py), and walks
# their arguments. PyTorch documents the mode as the extension point below autograd; when it goes: its successor there.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "TorchDispatchMode",
    "after_backward",
    "compute_local_shape_and_global_offset",
    "cpu_has_bf16",
    "forget_forwards",
    "quiet_known_warnings",
    "settle_shards",
    "tree_leaves",
    "tree_map_only",
]

# Warnings of torch's own that say nothing a user can act on; one documented list, and nothing broader.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # FSDP2's hooks hand nn.LSTM's outputs (and tensor-parallel linears') on through a custom Function that returns a
    # view; nothing is modified in place afterwards (DESIGN: known on this stack).
    (r".*is a view and is being modified inplace.*", UserWarning),
    (r".*returned a view.*", UserWarning),
    # nn.LSTM's weights are not one contiguous chunk once they are sharded; only cuDNN's speed depends on it.
    (r".*RNN module weights are not part of single contiguous chunk of memory.*", UserWarning),
)


def cpu_has_bf16() -> bool:
    """Whether this x86 processor multiplies bf16 natively.

    Checked on 2.13. Elsewhere torch emulates such products, far slower than fp32's. When these names go: read the
    flags avx512_bf16 and amx_bf16 from the operating system.
    """
    import torch

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def quiet_known_warnings() -> None:
    """Installs the filters above. Called where ranks start (and by the tests), never at import."""
    for pattern, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)


def settle_shards(modules: Iterable[Any]) -> None:
    """Makes FSDP2 take its padded copies of freshly filled shards now instead of at the first forward.

    Checked on 2.13. Without it, an uneven shard's local tensor is replaced at the first forward, and an optimizer built
    on the earlier one would update memory that nobody reads. When it goes: `module.unshard(); module.reshard()`.
    """
    for module in modules:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # 2.11 has one group a module
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        for group in groups:
            for fsdp_param in group.fsdp_params:
                fsdp_param.reset_sharded_param()


def after_backward(callback: Callable[[], None]) -> None:
    """Runs `callback` when the backward pass that is under way is over. Checked on 2.13; FSDP2 itself stands on it."""
    from torch.autograd import Variable

    Variable._execution_engine.queue_callback(callback)


def forget_forwards(root: Any) -> None:
    """Tells FSDP2 that forwards without a backward (evaluation) are over, so that prefetching follows training alone.

    `reset_iter_state` is public since 2.13 (nothing to do before), but fails until the first forward has set up its
    streams; that is looked up here. When the look-up goes: call it after forwards only.
    """
    if hasattr(root, "reset_iter_state") and hasattr(root._get_fsdp_state()._comm_ctx, "all_gather_state"):
        root.reset_iter_state()
