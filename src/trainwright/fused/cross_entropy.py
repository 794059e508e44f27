"""The projection to the vocabulary and the cross-entropy in one, a chunk of tokens at a time.

The whole logits [tokens, V], their gradient and fp32 copies of both never exist. In forward each chunk's logits are
made, turned into their loss and at once into their gradient, as in Liger's kernel (arXiv 2410.10989); backward only
scales what is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainwright.fused.linear import widens
from trainwright.fused.token_losses import PLAIN, Again, LossTerms, VocabularySlice, token_losses
from trainwright.other_machines import planned_for
from trainwright.torch_private import has_values
from trainwright.torch_private.autograd import keeps_graph

IGNORE_INDEX = -100
_CHUNK_BYTES = 1 << 24
"""Logits a chunk, where D tokens (twice as many of a narrow format) give fewer."""
_CHUNK_TOKENS = 1024
"""Tokens a chunk at most, where they give more logits than that: products are at their best long before."""
_ROWS = 64
"""Larger chunks are multiples of it: on CPUs products of 682 rows take a quarter longer than those of 683 or 704."""
_TILE_ELEMENTS = 1 << 21
"""Elements of the weight, or of narrow logits, that are widened at once: 8 MB of fp32."""
_PRODUCT_ELEMENTS = 1 << 20
"""Elements of the weight's gradient whose narrow product is made, widened and added at once: 4 MB of fp32."""


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "*batch"],
    vocabulary: VocabularySlice | None = None,
    terms: LossTerms = PLAIN,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(Σ cross-entropy of softmax(hidden weightᵀ) against labels over the valid tokens, their number).

    labels: -100 is ignored. The sum is fp32 (fp64 for fp64 inputs); with no valid token it is 0, with zero gradients.
    Differentiable once, in `hidden` and `weight`.
    vocabulary: `weight` is this rank's rows of the whole matrix, `hidden` and `labels` are the same on all ranks of its
        group. The sum is that over the whole vocabulary, the same on all; the gradient in `hidden` is this rank's
        part, to be summed over the group by the caller. Collective, in forward (in fp16 in backward too).
    terms: label smoothing, z-loss, soft cap of the logits.
    """
    flat_labels = labels.reshape(-1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss_sum = _LinearCrossEntropy.apply(flat, weight, flat_labels, vocabulary, terms)
    return loss_sum, (flat_labels != IGNORE_INDEX).sum()


def cross_entropy(logits: Float[Tensor, "*batch V"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the valid labels (not -100), in fp32 (fp64 for fp64 logits); with no valid label 0, with
    zero gradients, where torch's is NaN.

    labels: the target of each position, already shifted.
    """
    loss_sum, tokens = summed_cross_entropy(logits, labels)
    return loss_sum / tokens.clamp(min=1)


def summed_cross_entropy(
    logits: Float[Tensor, "*batch V"], labels: Int[Tensor, "*batch"], terms: LossTerms = PLAIN
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(Σ cross-entropy over the valid labels, their number), from logits that exist already. terms: as above."""
    flat = labels.reshape(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    if terms.softcap is not None:
        wide = terms.softcap * torch.tanh(wide / terms.softcap)
    loss_sum = F.cross_entropy(
        wide, flat, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=terms.label_smoothing
    )
    if terms.z_loss:
        log_z = torch.logsumexp(wide, dim=1).masked_fill(flat == IGNORE_INDEX, 0.0)
        loss_sum = loss_sum + terms.z_loss * log_z.square().sum()
    return loss_sum, (flat != IGNORE_INDEX).sum()


def _chunks(tokens: int, vocab_size: int, width: int, itemsize: int) -> list[slice]:
    """Slices of the tokens, about as even as they come: none is small but perhaps the last. itemsize: of the logits, bytes.

    A chunk passes over its logits [C, V] a few times, and over the weight [V, D] and its fp32 gradient once: with logits of D
    fp32 numbers a row of the weight the passes are of one size, and a chunk is at most as large as that gradient.
    """
    fullest = max(_CHUNK_BYTES // max(vocab_size * itemsize, 1), min(width * 4 // itemsize, _CHUNK_TOKENS))
    count = max(1, -(-tokens // max(fullest, 1)))
    rows = max(1, -(-tokens // count))
    if rows > _ROWS:
        rows = -(-rows // _ROWS) * _ROWS
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


class _Head:
    """The weight [V, D] in its products. Those that go through fp32 widen a tile of its rows at a time, not a whole copy."""

    def __init__(self, weight: Tensor, widened: bool) -> None:
        self.weight = weight
        self.dtype = torch.float32 if widened else weight.dtype
        rows = _TILE_ELEMENTS // max(weight.shape[1], 1) if widened else weight.shape[0]
        self._rows = max(1, min(rows, weight.shape[0]))
        self._tile = weight.new_empty(self._rows, weight.shape[1], dtype=self.dtype) if widened else None

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the vocabulary, the weight's as they are multiplied with, until the next tile)."""
        for start in range(0, self.weight.shape[0], self._rows):
            part = self.weight[start : start + self._rows]
            yield slice(start, start + len(part)), part if self._tile is None else self._tile[: len(part)].copy_(part)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden [C, D] -> out [C, V]."""
        for rows, part in self.tiles():
            torch.mm(hidden, part.t(), out=out[:, rows])
        return out


def _rows_at_once(matrix: Tensor, elements: int) -> int:
    """Of a matrix on a CPU those with about so many elements, elsewhere all. A dry run goes through them in eight parts at most."""
    rows, width = matrix.shape
    if matrix.device.type != "cpu" or planned_for():
        return max(rows, 1)
    few = max(1, min(rows, elements // max(width, 1)))
    return few if has_values(matrix) else max(few, -(-rows // 8))


class _Gradients:
    """Gradients in `hidden` and the weight, gathered chunk by chunk; the weight's sum in fp32 (fp64)."""

    def __init__(self, hidden: Tensor, head: _Head, wanted: tuple[bool, bool], chunks: int) -> None:
        self._head = head
        self._hidden_gradient = torch.empty_like(hidden, dtype=head.dtype) if wanted[0] else None
        self._weight_gradient: Tensor | None = None
        self._none_yet = True
        if wanted[1]:
            wide = head.dtype if chunks == 1 else torch.promote_types(head.dtype, torch.float32)
            self._weight_gradient = torch.empty_like(head.weight, dtype=wide)
        # A sum of narrow products takes each in as fp32: on CPUs by way of a copy, which should stay in the cache.
        self._rows = _rows_at_once(head.weight, _PRODUCT_ELEMENTS)

    def add(self, rows: slice, hidden: Tensor, logits_gradient: Tensor, valid: Tensor) -> None:
        """logits_gradient [C, V], as if every row counted; `valid` [C, 1], 0 or 1, silences rows at the narrow side."""
        silenced = hidden * valid
        of_hidden = torch.zeros_like(hidden) if self._hidden_gradient is not None else None
        for part, weight in self._head.tiles():
            slope = logits_gradient[:, part]
            if of_hidden is not None:
                of_hidden.addmm_(slope, weight, beta=int(part.start > 0))
            if self._weight_gradient is not None:
                self._add_to(self._weight_gradient[part], slope.t(), silenced)
        if of_hidden is not None and self._hidden_gradient is not None:
            torch.mul(of_hidden, valid, out=self._hidden_gradient[rows])
        self._none_yet = False

    def _add_to(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if total.dtype == right.dtype:
            total.addmm_(left, right, beta=int(not self._none_yet))
            return
        add = Tensor.copy_ if self._none_yet else Tensor.add_
        for start in range(0, len(total), self._rows):
            part = slice(start, start + self._rows)
            add(total[part], left[part] @ right)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        if self._none_yet and self._weight_gradient is not None:
            self._weight_gradient.zero_()
        return self._hidden_gradient, self._weight_gradient


def _pass(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocabulary: VocabularySlice | None,
    terms: LossTerms,
    wanted: tuple[bool, bool],
    scale: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Loss sum [] and gradients (of scale x sum; of the sum where scale is None) over all chunks."""
    head = _Head(weight, widens(hidden))
    # Ranks that share a vocabulary must cut the tokens alike: the fullest decides.
    vocab_size = weight.shape[0] if vocabulary is None else vocabulary.largest
    itemsize = head.dtype.itemsize if vocabulary is None else 4  # their processors may differ
    chunks = _chunks(hidden.shape[0], vocab_size, hidden.shape[1], itemsize)
    gradients = _Gradients(hidden, head, wanted, len(chunks)) if any(wanted) else None
    loss_sum = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    # One room for every chunk's logits: a fresh one is touched page by page, which takes as long as half the product.
    room = weight.new_empty(chunks[0].stop if chunks else 0, weight.shape[0], dtype=head.dtype)
    softmaxes = _Softmaxes(room, terms, gradients is not None, vocabulary)
    for rows in chunks:
        chunk = hidden[rows].to(head.dtype)
        valid = labels[rows].ne(IGNORE_INDEX).unsqueeze(1)
        index = labels[rows].clamp(min=0).unsqueeze(1)
        logits = head.logits(chunk, room[: len(chunk)])
        losses, slope = softmaxes(logits, index, valid, functools.partial(_logits_of, head, chunk), scale)
        loss_sum += losses.masked_fill_(~valid, 0.0).sum()
        if gradients is not None and slope is not None:
            gradients.add(rows, chunk, slope, valid.to(head.dtype))
    return loss_sum, (None, None) if gradients is None else gradients.result()


class _Softmaxes:
    """The losses of a chunk's logits, and in their place their gradient.

    Narrow logits want fp32 for their softmax. A GPU's kernel converts as it reads; on a CPU a few rows at a time are
    widened, in one room that stays in the cache. Where ranks share the vocabulary it takes the whole chunk: its losses
    are collective.
    """

    def __init__(self, room: Tensor, terms: LossTerms, slope: bool, vocabulary: VocabularySlice | None) -> None:
        self._terms, self._slope, self._vocabulary = terms, slope, vocabulary
        wide = torch.promote_types(room.dtype, torch.float32)
        self._tile: Tensor | None = None
        if room.device.type == "cpu" and room.dtype != wide:
            rows = len(room) if vocabulary is not None else _rows_at_once(room, _TILE_ELEMENTS)
            self._tile = room.new_empty(rows, room.shape[1], dtype=wide)

    def __call__(
        self,
        logits: Tensor,
        index: Tensor,
        valid: Tensor,
        again: Callable[[Tensor], Tensor],
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """logits [C, V], index and valid [C, 1] -> (losses [C, 1], slope [C, V] in the logits' format, times scale)."""
        tile, losses, slope = self._tile, [], None
        rows = len(logits) if tile is None else len(tile)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            own = logits[part]
            wide = own if tile is None else tile[: len(own)].copy_(own)
            # Until its slope is there, the narrow logits are.
            anew = None if planned_for() else Again(valid[part], again if tile is None else own.__getitem__)
            of_part, slope = token_losses(wide, index[part], self._terms, self._slope, self._vocabulary, anew)
            losses.append(of_part)
            if slope is not None:
                slope = slope if scale is None else slope.mul_(scale)
                slope = slope if slope.dtype == own.dtype else own.copy_(slope)
        return torch.cat(losses), slope if tile is None or slope is None else logits


def _logits_of(head: _Head, hidden: Tensor, rows: Tensor) -> Tensor:
    """Of some rows of `hidden` [C, D]."""
    return head.logits(hidden[rows], hidden.new_empty(len(rows), len(head.weight)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward at scale 1. In fp16, whose small numbers underflow without the loss scale, they
    are made in backward, with the scale that arrives there, from logits made again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: VocabularySlice | None,
        terms: LossTerms,
    ) -> Tensor:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        ctx.dtype = hidden.dtype
        ctx.vocabulary, ctx.terms = vocabulary, terms
        ctx.late = hidden.dtype == torch.float16 and not widens(hidden)
        if ctx.late:
            ctx.save_for_backward(hidden, weight, labels)
            return _pass(hidden, weight, labels, vocabulary, terms, (False, False), None)[0]
        loss_sum, gradients = _pass(hidden, weight, labels, vocabulary, terms, wanted, None)
        ctx.save_for_backward(*gradients)
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.late:
            hidden, weight, labels = ctx.saved_tensors
            wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            gradients = _pass(hidden, weight, labels, ctx.vocabulary, ctx.terms, wanted, scale)[1]
        else:
            kept = keeps_graph()  # for a second backward, which will want them at scale 1 again
            first, second = (g if g is None else g * scale if kept else g.mul_(scale) for g in ctx.saved_tensors)
            gradients = first, second
        first, second = (g if g is None else g.to(ctx.dtype) for g in gradients)
        return first, second, None, None, None
