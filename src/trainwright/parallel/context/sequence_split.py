"""Micro-batches cut along the sequence: each context rank gets a contiguous slice of every row.

A sequence whose length does not divide is filled up at its end with tokens that nobody sees and that have no label.
Shapes: B batch, T tokens of a whole sequence, N context ranks, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.data.batch import IGNORE_INDEX, Batch
from trainwright.errors import UsageError
from trainwright.fused.cross_entropy import summed_cross_entropy
from trainwright.models.output import LMOutput
from trainwright.models.pretrained import count_valid_tokens
from trainwright.models.sequence import Attend, SequenceSlice, sequence_slice
from trainwright.parallel.collectives import GroupRanks, gather_slices, reduce

# What a fill-up token holds, by the name of the input; 0 for the others.
_FILL = {"labels": IGNORE_INDEX, "document_ids": -1}


@dataclass(frozen=True)
class SequenceSplit:
    """How a rank's micro-batches are cut along the sequence. With one rank everything stays whole."""

    ranks: int = 1
    rank: int = 0
    group: Any = None
    attention: Callable[[Attend], Attend] | None = None
    shifts: bool = False
    """The model's own loss shifts the labels by one: that has to happen before they are cut."""
    sums_itself: bool = True
    """The model takes labels and returns the sum of its losses; else they are made from its logits."""
    packs_by_position: bool = False
    """Positions that start again mark documents, as in Hugging Face's models where no cache is filled."""
    caches: bool = False
    """The model fills a cache where it is not told otherwise."""

    def slicing(self, micro_batch: Batch | Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around every forward on `split(micro_batch)`."""
        return sequence_slice(self.place(micro_batch))

    def place(self, micro_batch: Batch | Mapping[str, Any]) -> SequenceSlice | None:
        """This rank's slice of a whole micro-batch's sequences; None with one rank."""
        if self.ranks == 1:
            return None
        assert self.attention is not None, "a split over ranks comes with an attention"
        inputs = _named(micro_batch)
        length = _shape(inputs)[1]
        mask, documents = inputs.get("attention_mask"), inputs.get("document_ids")
        if isinstance(micro_batch, Batch) and micro_batch.position_ids is None:
            documents = None  # numbers for whoever wants them: attention crosses documents
        if documents is None and mask is None and self.packs_by_position and not inputs.get("use_cache", self.caches):
            documents = _documents_of_positions(inputs.get("position_ids"))
        return SequenceSlice(
            first=self.rank * self._local(length),
            length=length,
            padded_length=self.ranks * self._local(length),
            valid=None if mask is None else self._fill_up(mask.bool(), False),
            document_ids=None if documents is None else self._fill_up(documents, _FILL["document_ids"]),
            attention=self.attention,
        )

    def split(self, micro_batch: Any) -> Any:
        """This rank's slice [B, ceil(T/N)] of a whole micro-batch [B, T]: a Batch, or a dict of a forward's inputs.

        Labels of a model that shifts them come back shifted. An attention mask is left out: it is with `slicing`.
        Raises UsageError for an input whose place along the sequence is not known.
        """
        if self.ranks == 1:
            return micro_batch
        inputs = _named(micro_batch)
        batch, length = _shape(inputs)
        cut: dict[str, Any] = {}
        for name, value in inputs.items():
            if name == "labels" and self.shifts and not isinstance(micro_batch, Batch) and isinstance(value, Tensor):
                value = F.pad(value[:, 1:], (0, 1), value=IGNORE_INDEX)
            if not isinstance(value, Tensor) or value.ndim == 0:
                cut[name] = value
            elif (
                value.shape[1:2] != (length,)
                or value.shape[0] not in (1, batch)
                or (name.endswith("mask") and value.ndim > 2)
            ):
                _refuse_input(name, value, length)
            elif name != "attention_mask":
                cut[name] = self._slice(value, _FILL.get(name, 0))
        if not isinstance(micro_batch, Batch):
            return cut
        return replace(micro_batch, **cut)

    def _local(self, length: int) -> int:
        return -(-length // self.ranks)

    def _fill_up(self, value: Tensor, fill: int | bool) -> Tensor:
        """[B, T, ...] -> [B, padded T, ...]."""
        missing = self.ranks * self._local(value.shape[1]) - value.shape[1]
        return F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing), value=fill) if missing else value

    def _slice(self, value: Tensor, fill: int | bool) -> Tensor:
        local = self._local(value.shape[1])
        return self._fill_up(value, fill)[:, self.rank * local : (self.rank + 1) * local]

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module's forward on whole inputs, each rank on its slice of them. Collective over the context ranks.

        With labels, `.loss` is the mean over the valid labels of the whole sequences, on every rank, and its gradient is
        that of the rank's own tokens; `.logits` are None, unless our models are asked for them (`return_logits`).
        Without labels, `.logits` [B, T, V] are whole on every rank. Other outputs are those of the slice.
        """
        if self.ranks == 1:
            return module(*args, **kwargs)
        inputs = _bind(module, args, kwargs)
        length = _shape(inputs)[1]
        local = self.split(inputs)
        labels = None if self.sums_itself else local.pop("labels", None)
        with self.slicing(inputs):
            output = module(**local)
        if labels is not None:  # Hugging Face's mean over the slice would be a mean of means in the end
            loss_sum = summed_cross_entropy(output.logits, labels)[0]
            loss = self._mean(loss_sum, count_valid_tokens(module, inputs["labels"]))
            return _with(output, loss=loss, logits=None)
        if getattr(output, "loss_sum", None) is not None:
            tokens = count_valid_tokens(module, inputs["labels"])
            loss = self._mean(output.loss_sum, tokens)
            output = _with(output, loss=loss, loss_sum=loss * tokens, tokens=tokens)
        if output.logits is None:
            return output
        return _with(output, logits=gather_slices(output.logits, self.group)[:, :length])

    def _mean(self, loss_sum: Tensor, tokens: Tensor) -> Tensor:
        return reduce(loss_sum, GroupRanks(self.group, self.ranks, self.rank)) / tokens.clamp(min=1)


def _named(micro_batch: Batch | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(micro_batch, Batch):
        return micro_batch
    names = ("input_ids", "labels", "document_ids", "position_ids")
    return {name: value for name in names if (value := getattr(micro_batch, name)) is not None}


def _shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(B, T) of the tokens."""
    for name in ("input_ids", "inputs_embeds", "labels"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    raise UsageError(
        f"inputs {', '.join(inputs) or '(none)'} with parallel.context > 1",
        "the sequence is cut along the second dimension of input_ids",
        "input_ids=TOKENS of shape [B, T]",
    )


def _refuse_input(name: str, value: Tensor, length: int) -> None:
    raise UsageError(
        f"input {name} of shape {tuple(value.shape)} with parallel.context > 1, sequences of {length} tokens",
        "tensors with a forward are [B, T] or [B, T, ...]: they are cut along T; attention_mask is [B, T] too",
        f"leave {name} out, or parallel.context=1",
    )


def _documents_of_positions(position_ids: Any) -> Tensor | None:
    """[B or 1, T] document numbers where positions start again within a row; None where they do not."""
    if not isinstance(position_ids, Tensor):
        return None
    starts = position_ids.diff(dim=1) != 1
    return F.pad(starts.cumsum(dim=1), (1, 0)) if bool(starts.any()) else None


def _with(output: Any, **changes: Tensor | None) -> Any:
    """A forward's output, ours or Hugging Face's, with other tensors in it."""
    if isinstance(output, LMOutput):
        return output._replace(**changes)
    return type(output)(**{key: value for key, value in (dict(output) | changes).items() if value is not None})


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by name."""
    if not args:
        return dict(kwargs)
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return dict(zip(names, args, strict=False)) | dict(kwargs)
