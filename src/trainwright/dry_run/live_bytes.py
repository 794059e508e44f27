"""The bytes that live tensors hold, operator by operator, told apart by what they are for.

Works on real and on fake tensors alike: it looks at storages as torch's operators create them, frees them, and as FSDP2
resizes them, never at their contents. What a GPU's caching allocator rounds up or keeps is not in it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from trainwright.dry_run.timeline import Timeline
from trainwright.torch_private import tree_leaves
from trainwright.torch_private.autograd import in_backward

KINDS = {
    "parameters": "parameters (masters)",
    "buffers": "buffers and tables",
    "optimizer": "optimizer states",
    "average": "weights' moving average",
    "gradients": "gradients, reduced (shards)",
    "whole_gradients": "gradients before reduction",
    "whole_parameters": "whole parameters (compute copies)",
    "communication": "communication buffers",
    "activations": "activations",
    "logits": "loss: logits and their gradient",
    "backward": "backward: activations' gradients",
    "update": "update: working memory",
}
"""Kind -> its words in a table. Kinds of a state come first, then those of a step."""


HEAP_BLOCK_BYTES = 32 << 20
"""glibc gives larger blocks pages of their own, and takes these back when they are freed (mallopt(3), M_MMAP_THRESHOLD)."""
_UNKNOWN = "unknown"
"""A flat buffer that FSDP2 has just made; the operator that fills it tells what it is."""


@dataclass
class _Block:
    kind: str
    size_bytes: int
    reference: Any


@dataclass(frozen=True)
class ModelShapes:
    """What a tensor's shape tells about it."""

    whole: frozenset[tuple[int, ...]]
    """Shapes of whole parameters (under tensor parallelism: a tensor rank's part), and the transposed ones."""
    vocabularies: frozenset[int]
    """Sizes of the last dimension of logits."""

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter], vocab_size: int | None) -> ModelShapes:
        """From sharded parameters."""
        shapes = [(tuple(p.shape), _before_sharding(p)) for p in parameters]
        whole = {shape for _, shape in shapes}
        # The embedding's or head's first dimension: under tensor parallelism this rank's part of the vocabulary.
        vocabularies = {shape[0] for full, shape in shapes if len(full) == 2 and full[0] == vocab_size}
        return cls(frozenset(whole | {shape[::-1] for shape in whole}), frozenset(vocabularies))


def _before_sharding(parameter: nn.Parameter) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and names[axis : axis + 1] == ("tensor",):
                size, rank = parameter.device_mesh.size(axis), parameter.device_mesh.get_local_rank(axis)
                part = -(-shape[placement.dim] // size)  # torch.chunk's rule
                shape[placement.dim] = max(0, min(part, shape[placement.dim] - rank * part))
    return tuple(shape)


@dataclass
class LiveBytes:
    """Bytes by kind of `KINDS`: now, at the moment when their sum was largest, and each kind's own maximum."""

    shapes: ModelShapes
    in_update: bool = False
    before: Counter[str] = field(default_factory=Counter)
    """When the step began."""
    at_update: Counter[str] = field(default_factory=Counter)
    """When the optimizer begins."""
    now: Counter[str] = field(default_factory=Counter)
    at_peak: Counter[str] = field(default_factory=Counter)
    largest: Counter[str] = field(default_factory=Counter)
    heap_at_peak: int = 0
    heap_largest: Counter[str] = field(default_factory=Counter)
    """The same of blocks that a C library takes from its heap: those below `HEAP_BLOCK_BYTES`."""
    peak_phase: str = ""
    peak_bytes: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _total_bytes: int = 0
    _heap_now: Counter[str] = field(default_factory=Counter)

    @property
    def heap_holes_bytes(self) -> int:
        """What the kinds' own maxima in the heap are more, together, than it holds at the peak."""
        return max(0, sum(self.heap_largest.values()) - self.heap_at_peak)

    def begin(self) -> None:
        """What is held now was there before the step."""
        self.before, self.at_peak, self.peak_bytes = self.now.copy(), self.now.copy(), self._total_bytes
        self.timeline = Timeline()

    def begin_update(self) -> None:
        """The optimizer begins: what is made from now on is its working memory."""
        self.in_update, self.at_update = True, self.now.copy()

    def end(self) -> None:
        """Counts buffers that no operator has told the purpose of as communication."""
        for counts in (self.before, self.at_update, self.now, self.at_peak, self.largest):
            counts["communication"] += counts.pop(_UNKNOWN, 0)
        self.timeline.end({_UNKNOWN: "communication"})

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Counts `tensor`'s storage as `kind` from now on."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self._hold(local.untyped_storage(), kind)

    def _hold(self, storage: Any, kind: str) -> None:
        key = storage._cdata
        block = self._blocks.get(key)
        if block is not None and block.reference() is not None:
            self._add(block.kind, -block.size_bytes)
            block.kind = kind
        else:
            block = _Block(kind, storage.nbytes(), weakref.ref(storage, partial(self._free, key)))
            self._blocks[key] = block
        self._add(kind, block.size_bytes)

    def _free(self, key: int, _: Any) -> None:
        block = self._blocks.get(key)
        if block is not None and block.reference() is None:
            del self._blocks[key]
            self._add(block.kind, -block.size_bytes)

    def _add(self, kind: str, size_bytes: int) -> None:
        self.now[kind] += size_bytes
        self._total_bytes += size_bytes
        if abs(size_bytes) < HEAP_BLOCK_BYTES:
            self._heap_now[kind] += size_bytes
            self.heap_largest[kind] = max(self.heap_largest[kind], self._heap_now[kind])
        if size_bytes <= 0:
            return
        self.timeline.note(self._phase(), self._total_bytes, self.now)
        self.largest[kind] = max(self.largest[kind], self.now[kind])
        if self._total_bytes >= self.peak_bytes:  # a block that only changed its kind counts too
            self.peak_bytes = self._total_bytes
            self.at_peak = self.now.copy()
            self.heap_at_peak = sum(self._heap_now.values())
            self.peak_phase = self._phase()

    def _phase(self) -> str:
        if self.in_update:
            return "update"
        return "backward" if in_backward() else "forward"

    # --- operators -------------------------------------------------------------------------------------------------

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One call of an operator."""
        namespace = operator.namespace
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                storage = leaf.untyped_storage()
                block = self._blocks.get(storage._cdata)
                if block is None or block.reference() is None:
                    self._hold(storage, self._kind_of(operator, leaf))
        if namespace in ("fsdp", "c10d"):
            self._relabel(operator.name(), args, kwargs)
        elif operator is torch.ops.aten._foreach_copy_.default and not self.in_update:  # parameters in another format
            self._relabel_all(args[0], "whole_parameters")
        self.timeline.tick(self._phase(), self._total_bytes, self.now)

    def _kind_of(self, operator: Any, tensor: Tensor) -> str:
        if self.in_update:
            return "update"
        shape = tuple(tensor.shape)
        if operator is torch.ops.aten.empty.memory_format and len(shape) == 1:
            return _UNKNOWN
        backward = in_backward()
        if backward and shape in self.shapes.whole:
            return "whole_gradients"
        if len(shape) > 1 and not self.shapes.vocabularies.isdisjoint(shape):
            return "logits"
        return "backward" if backward else "activations"

    def _relabel(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """FSDP2's own operators and the reduction tell what their buffers are."""
        if name.startswith("fsdp::split_with_sizes_copy"):
            self._relabel_all(kwargs["out"], "whole_parameters")
        elif name.startswith("fsdp::all_gather_copy_in"):
            self._relabel_all(args[:2], "communication")
        elif name.startswith("fsdp::chunk_cat"):
            self._relabel_all(kwargs["out"], "communication")
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self._relabel_all(args[0], "gradients")
        elif name.startswith("c10d::allreduce_"):  # of what a reduction over one rank has copied
            self._relabel_all(args[0], "gradients", only=_UNKNOWN)

    def _relabel_all(self, tensors: Any, kind: str, only: str | None = None) -> None:
        for tensor in tree_leaves(tensors):
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is None or (only is not None and block.kind != only):
                continue
            if block.kind not in ("parameters", "optimizer", "average", "buffers", kind):
                self._hold(tensor.untyped_storage(), kind)

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Inside it, storages that FSDP2 frees and allocates again by resizing them are counted as they are."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: Any, size_bytes: int) -> Any:
            result = original(storage, size_bytes)
            block = self._blocks.get(storage._cdata)
            if block is None or block.reference() is None:
                self._hold(storage, "whole_parameters")  # from a forward before the watch
            else:
                change, block.size_bytes = size_bytes - block.size_bytes, size_bytes
                self._add(block.kind, change)
            return result

        with replaced(torch.UntypedStorage, "resize_", resize_):
            yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside it `owner.name` is `value`."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
