"""The one home of names that torch keeps private; those of its collectives are in `collectives.py`, of its compiler in `compiler.py`.

Each name: the versions it was checked on, why it is needed, and what to do when it goes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# Checked on 2.13 (CPU). Which rows of a DTensor this rank holds: used to read slices of weight files and to draw
# initial values block by block. When it goes: compute it from mesh coordinate and torch.chunk's rule for Shard(0).
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Checked on 2.13. Writes down the operations of a model's constructor on its parameters (models/deferred.py), and walks
# their arguments. PyTorch documents the mode as the extension point below autograd; when it goes: its successor there.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from trainwright.scheduling import behind_computation

__all__ = [
    "TorchDispatchMode",
    "after_backward",
    "compute_local_shape_and_global_offset",
    "cpu_bf16_is_fast",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "cpu_has_tiles",
    "fake_tensor_mode",
    "finish_backward",
    "forget_forwards",
    "forget_meshes",
    "function_modes",
    "gather_without_waiting",
    "gloo_backend",
    "has_values",
    "in_backward",
    "keeps_graph",
    "log_softmax",
    "quiet_known_warnings",
    "settle_shards",
    "softmax",
    "softmax_backward",
    "start_fake_process_group",
    "tree_leaves",
    "tree_map_only",
    "without_chunks",
]

# Warnings of torch's own that say nothing a user can act on; one documented list, and nothing broader.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # FSDP2's hooks hand nn.LSTM's outputs (and tensor-parallel linears') on through a custom Function that returns a
    # view; nothing is modified in place afterwards (DESIGN: known on this stack).
    (r".*is a view and is being modified inplace.*", UserWarning),
    (r".*returned a view.*", UserWarning),
    # nn.LSTM's weights are not one contiguous chunk once they are sharded; only cuDNN's speed depends on it.
    (r".*RNN module weights are not part of single contiguous chunk of memory.*", UserWarning),
    # torchft 0.2's logger, on every process group without NCCL's flight recorder.
    (r"The 'warn' method is deprecated, use 'warning' instead", DeprecationWarning),
)


def cpu_bf16_is_fast() -> bool:
    """Whether this x86 processor's own bf16 products are faster than fp32's.

    With AMX they are; with AVX512-BF16 alone on AMD's, not on Intel's, where that instruction has half of fp32's rate
    (measured on a Sapphire Rapids whose AMX is hidden: 84 against 155 GFLOP/s, attention 3x slower). Intel's are told
    by AVX512-FP16, which came with that generation. Without either torch emulates such products, far slower still.
    Checked on 2.13 (`get_capabilities`; before it the first two names). When these go: read the flags from the
    operating system.
    """
    import torch

    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    avx512 = known.get("avx512_bf16", getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return cpu_has_tiles() or bool(avx512 and not known.get("avx512_fp16", False))


def cpu_has_tiles() -> bool:
    """Whether this processor multiplies bf16 by tiles (AMX). Checked and replaced as above."""
    import torch

    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16", getattr(torch.cpu, "_is_amx_tile_supported", bool)()))


def cpu_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention and the logarithms of its sums: what F.scaled_dot_product_attention runs on CPUs.

    Checked on 2.13, as is the next. When they go: F.scaled_dot_product_attention in fp32, which keeps fp32 for backward.
    """
    import torch

    out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return out, log_sums


def cpu_flash_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    import torch

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    by_query, by_key, by_value = operator(gradient, q, k, v, out, log_sums, 0.0, True)
    return by_query, by_key, by_value


def quiet_known_warnings() -> None:
    """Installs the filters above. Called where ranks start (and by the tests), never at import."""
    for pattern, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)
    # Said once a process when a tensor that tensor and ZeRO ranks both cut is put together (an export, a full state):
    # two gathers where one might do.
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return "sequential all_gather operations will be performed" not in record.getMessage()


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


def gather_without_waiting(root: Any) -> None:
    """Has FSDP2 hand on what its all-gathers return, to be waited for where the parameters are used.

    Checked on 2.13. On CPUs nothing else overlaps. When it goes: leave it out, the gathers are then waited for at once.
    """
    root._set_unshard_async_op(True)


def forget_forwards(root: Any) -> None:
    """Tells FSDP2 that forwards without a backward (evaluation) are over, so that prefetching follows training alone.

    `reset_iter_state` is public since 2.13 (nothing to do before), but fails until the first forward has set up its
    streams; that is looked up here. When the look-up goes: call it after forwards only.
    """
    if hasattr(root, "reset_iter_state") and hasattr(root._get_fsdp_state()._comm_ctx, "all_gather_state"):
        root.reset_iter_state()


def start_fake_process_group(rank: int, world_size: int) -> None:
    """A default process group of `world_size` ranks in this one process; its collectives send nothing.

    Checked on 2.13. torch's own tests stand on it; when it goes: a ProcessGroup subclass whose collectives return.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def forget_meshes() -> None:
    """Empties DTensor's cache of layouts, which knows meshes whose process groups are gone.

    Checked on 2.13. Meshes of one shape are equal to it, whatever their groups. When it goes: a process a group.
    """
    from torch.distributed.tensor import debug

    for name in ("_clear_sharding_prop_cache", "_clear_python_sharding_prop_cache"):  # the second is all that 2.11 has
        if hasattr(debug, name):
            getattr(debug, name)()
            return


def fake_tensor_mode() -> Any:
    """Inside it tensors have shape, dtype and device, and no memory. Checked on 2.13.

    Tensors of the meta device and real ones may take part. When it goes: its successor in torch.compile's tracing.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def without_chunks() -> Iterator[None]:
    """Inside it FSDP2 cuts out a rank's rows of a parameter without making those of all other ranks first.

    Checked on 2.13. It takes two of N chunks; at 16,384 ranks the others cost a second a transformer block. When the
    name goes, nothing is replaced, and only time is lost.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    module: Any = _fsdp_param
    original = getattr(module, "_chunk_with_empty", None)
    if original is not None:
        module._chunk_with_empty = _LazyChunks
    try:
        yield
    finally:
        if original is not None:
            module._chunk_with_empty = original


class _LazyChunks:
    """`torch.chunk(tensor, count, dim)`, filled up with empty tensors, each made when it is asked for."""

    def __init__(self, tensor: Any, count: int, dim: int) -> None:
        self._tensor, self._dim, self._rows = tensor, dim, -(-tensor.size(dim) // count)

    def __getitem__(self, index: int) -> Any:
        size = self._tensor.size(self._dim)
        start = index * self._rows
        if start >= size and index:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(self._rows, size - start))


def log_softmax(logits: Any, out: Any) -> Any:
    """log_softmax over the last dimension into `out`, which may be `logits`: rows are read before they are written.
    Checked on 2.13 (CPU); the public function has no `out`. When it goes: that one, and a copy."""
    import torch

    return torch._log_softmax(logits, logits.ndim - 1, False, out=out)


def softmax(logits: Any, out: Any) -> Any:
    """softmax over the last dimension into `out`, as `log_softmax` does; the same when it goes. Checked on 2.13 (CPU)."""
    import torch

    return torch._softmax(logits, logits.ndim - 1, False, out=out)


def softmax_backward(gradient: Any, p: Any, out: Any) -> Any:
    """p (gradient - Σ p gradient) over the last dimension into `out`, which may be `gradient`; as above."""
    import torch

    return torch._softmax_backward_data(gradient, p, p.ndim - 1, p.dtype, grad_input=out)


def has_values(tensor: Any) -> bool:
    """Whether there are values behind a tensor: not in a dry run. Checked on 2.13.

    When it goes: False costs a pass over the logits on CPUs (`fused/token_losses.py`).
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor)


def function_modes() -> tuple[Any, ...]:
    """The active TorchFunctionModes, outermost first. Checked on 2.13.

    Recomputation restores them: a backward pass runs without. When it goes: proofs in float64 with recomputation fail
    on float32 casts; nothing else needs it.
    """
    from torch.overrides import _get_current_function_mode_stack

    return tuple(_get_current_function_mode_stack())


def finish_backward(root: Any) -> None:
    """Does what FSDP2's hooks do at the end of a backward pass, for gradients that came without it.

    Checked on 2.13. The second half of a zero-bubble backward asks autograd for the weights' gradients alone, so that no
    hook of a module runs: here they are added up in the reduction's format, or reduced, as the flags say. When it goes:
    `PipelineStage.perform_reduce_grad` shows the calls of the day.
    """
    root._get_fsdp_state()._root_post_backward_final_callback()


def gloo_backend(store: Any, rank: int, size: int, timeout: Any, address: str) -> Any:
    """A Gloo backend of its own on the interface that has `address`, beside the default process group.

    Checked on 2.13. The public constructor takes no device; GLOO_SOCKET_IFNAME would turn every other group to the link as
    well. When `_Options` goes: set that variable around the constructor.
    """
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    with behind_computation():
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        return ProcessGroupGloo(store, rank, size, options)
