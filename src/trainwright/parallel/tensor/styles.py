"""How one module is cut over the tensor-parallel ranks: the styles of Hugging Face's `base_model_tp_plan` tables.

| style | weight [out, in] | computes |
|---|---|---|
| colwise | rows of the output | this rank's part of the output |
| colwise_gather_output, colwise_rep | the same | all of the output, gathered |
| rowwise | columns of the input | the sum over ranks, from this rank's part of the input |
| rowwise_split_input, rowwise_rep | the same | the sum over ranks, from all of the input |
| embedding_rowwise | rows of the vocabulary | the sum over ranks: each token is found on one of them |
| replicated_with_grad_allreduce | whole | with this rank's part of the activations; the gradient is the ranks' sum |

Parameters are DTensors on the tensor mesh, so that what shards, saves and fills them goes by placements. Computation is
local: inside a module's forward its parameters are this rank's plain tensors, and what the ranks owe each other are the
functions of `collectives.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trainwright.fused.cross_entropy import linear_cross_entropy, summed_cross_entropy
from trainwright.fused.token_losses import LossTerms, VocabularySlice
from trainwright.parallel.collectives import (
    GroupRanks,
    enter,
    gather_features,
    gather_sequence,
    reduce,
    scatter_sequence,
    split_features,
)

COLUMN = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
ROW = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
SPLIT = frozenset({"rowwise_split_input", "rowwise_rep"})
EMBEDDING = "embedding_rowwise"
SUMMED = "replicated_with_grad_allreduce"
STYLES = COLUMN | ROW | {EMBEDDING, SUMMED}
"""Every style that is understood."""


@dataclass(frozen=True)
class Cutting:
    """What the styles of one model share.

    sequence: the residual stream is cut along the sequence. entered: the model itself calls `enter` (or gathers) ahead
    of the modules that make a part of the work each, once for all that share an input.
    """

    mesh: DeviceMesh
    ranks: GroupRanks
    sequence: bool
    entered: bool
    _last: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def enter(self, x: Tensor) -> Tensor:
        """The input of a module that makes a part of the work. Modules that share one (q, k, v) share its `enter`, so
        that backward sums once for all."""
        if self.entered or torch.compiler.is_compiling():
            return x if self.entered else enter(x, self.ranks)
        if not self._last or self._last[0][0] is not x:
            self._last[:] = [(x, enter(x, self.ranks))]
        return self._last[0][1]

    def forget(self) -> None:
        """Lets go of the last shared input."""
        self._last.clear()

    def leave(self, x: Tensor) -> Tensor:
        """The ranks' sum, on the residual stream."""
        self.forget()
        return scatter_sequence(x, self.ranks) if self.sequence else reduce(x, self.ranks)


@dataclass(frozen=True)
class ResidualPart:
    """The residual stream of one forward over `length` positions (`models.residual.ResidualSlice`)."""

    cutting: Cutting
    length: int

    @property
    def first(self) -> int:
        ranks = self.cutting.ranks
        return ranks.rank * ranks.largest(self.length) if self.cutting.sequence else 0

    def whole(self, x: Tensor) -> Tensor:
        ranks = self.cutting.ranks
        return gather_sequence(x, ranks, self.length) if self.cutting.sequence else enter(x, ranks)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer: nn.Linear's, and those of Hugging Face's Conv1D; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if _is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(columns), int(rows)
    return None


def placement(module: nn.Module, name: str, style: str | None) -> Shard | Replicate:
    """Where the parameter `name` of `module` goes."""
    transposed = _is_conv1d(module)
    if style in COLUMN:
        return Shard(1 if transposed and name == "weight" else 0)
    if style in ROW and name == "weight":
        return Shard(0 if transposed else 1)
    if style == EMBEDDING and name == "weight":
        return Shard(0)
    return Replicate()


def install(module: nn.Module, style: str | None, cutting: Cutting) -> None:
    """Replaces the forward of `module`, whose parameters are DTensors, by one that computes this rank's part."""
    hidden = ("bias",) if style in ROW else ()
    # A slice of the sequence, or of the heads, makes a part of a whole parameter's gradient.
    original = module.forward
    local = _local_forward(module, cutting.sequence or style == SUMMED, hidden)
    if style in COLUMN:
        forward = _column_forward(module, local, style in GATHERED, cutting)
    elif style in ROW:
        forward = _row_forward(module, local, style in SPLIT, cutting)
    elif style == EMBEDDING:
        forward = _embedding_forward(module, local, cutting)
    else:
        forward = local
    module.forward = functools.wraps(original)(forward)


Forward = Callable[..., Any]


def _column_forward(module: Any, local: Forward, gathered: bool, cutting: Cutting) -> Forward:
    sizes = features(module)
    assert sizes is not None, f"{type(module).__name__} is no linear layer"
    out = sizes[0]
    if _is_conv1d(module):
        module.nf = cutting.ranks.here(out)  # its forward shapes the output by this

    def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part: Tensor = local(cutting.enter(input), *args, **kwargs)
        if not gathered:
            return part
        cutting.forget()
        return gather_features(part, cutting.ranks, out)

    projects = isinstance(module, nn.Linear) and getattr(module, "bias", None) is None
    if gathered and projects:
        module.fused_loss = _vocabulary_loss(module, out, cutting)
    return forward


def _vocabulary_loss(head: Any, vocab_size: int, cutting: Cutting) -> Callable[..., tuple[Tensor, Tensor]]:
    """What `models.head.head_loss` takes in place of the weight."""
    ranks = cutting.ranks
    place = VocabularySlice(ranks.first(vocab_size), ranks.largest(vocab_size), vocab_size, ranks.group)

    def fused_loss(hidden: Tensor, labels: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
        weight = head.weight
        if not is_gathered(weight):  # a sharding unit of its own: its weight is whole inside its forward alone
            return summed_cross_entropy(head(hidden), labels, terms)
        entered = hidden if cutting.entered else enter(hidden, ranks)
        return linear_cross_entropy(entered, weight.to_local(), labels, place, terms)

    return fused_loss


def _row_forward(module: nn.Module, local: Forward, split: bool, cutting: Cutting) -> Forward:
    def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        part = split_features(input, cutting.ranks) if split else input
        out = cutting.leave(local(part, *args, **kwargs))
        bias = getattr(module, "bias", None)
        return out if bias is None else out + _local(bias, cutting.sequence)

    return forward


def _embedding_forward(module: nn.Module, local: Forward, cutting: Cutting) -> Forward:
    assert isinstance(module, nn.Embedding), f"{type(module).__name__} is no embedding"
    ranks, rows = cutting.ranks, module.num_embeddings
    first, here = ranks.first(rows), ranks.here(rows)
    if module.padding_idx is not None:
        own = module.padding_idx - first
        module.padding_idx = own if 0 <= own < here else None

    def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index = input - first
        elsewhere = (index < 0) | (index >= here)
        found: Tensor = local(index.clamp(0, max(here - 1, 0)), *args, **kwargs)
        return cutting.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    return forward


def _local_forward(module: nn.Module, partial: bool, hidden: tuple[str, ...]) -> Forward:
    """The module's own forward with plain tensors for parameters; those in `hidden` are left out."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _local_parameters(module, partial, hidden):
            return original(*args, **kwargs)

    return forward


@contextmanager
def _local_parameters(module: Any, partial: bool, hidden: tuple[str, ...]) -> Iterator[None]:
    # Direct parameters only: FSDP's hooks, which exchange a unit's parameters, never run inside this.
    held: dict[str, Any] = module._parameters
    saved = {name: p for name, p in held.items() if is_gathered(p)}
    flat = getattr(module, "_flat_weights", None)  # nn.LSTM and its kin read this list
    for name, parameter in saved.items():
        held[name] = _absent(module, parameter) if name in hidden else _local(parameter, partial)
    if flat is not None:
        module._flat_weights = [held[name] for name in module._flat_weights_names]
    try:
        yield
    finally:
        held.update(saved)
        if flat is not None:
            module._flat_weights = flat


def _absent(module: nn.Module, bias: DTensor) -> Tensor | None:
    """What stands in a bias's place that is added later."""
    return bias.to_local().new_zeros(bias.shape) if _is_conv1d(module) else None


def is_gathered(parameter: Any) -> bool:
    """Whether `parameter` is cut over the tensor ranks alone: not, or not at the moment, sharded by ZeRO."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1


def _local(parameter: Any, partial: bool) -> Tensor:
    """This rank's part; with `partial`, the gradient of a whole parameter is the sum over the ranks."""
    summed = partial and isinstance(parameter.placements[0], Replicate)
    local: Tensor = parameter.to_local(grad_placements=[Partial()] if summed else None)
    return local


def cut_parameter(parameter: nn.Parameter, place: Shard | Replicate, cutting: Cutting) -> nn.Parameter:
    """`parameter`, whose values are the same on all ranks (or nowhere: meta), as a DTensor. Sends nothing."""
    ranks, whole = cutting.ranks, parameter.detach()
    local = whole
    if isinstance(place, Shard):
        size = whole.shape[place.dim]
        local = whole.narrow(place.dim, ranks.first(size), ranks.here(size))
        local = local.clone(memory_format=torch.contiguous_format)  # the whole one is freed
    tensor = DTensor.from_local(local, cutting.mesh, [place], run_check=False, shape=whole.shape, stride=whole.stride())
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's GPT-2 layer: weight [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
