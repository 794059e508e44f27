"""Cross-entropy of a chunk of tokens from its logits, with what may be added to it, and its gradient in the logits.

With logits l [V], log Z = log Σ exp l, log p = l - log Z, target t, smoothing ε and z-loss weight ζ:

    loss = -(1 - ε) log p_t - ε/V Σ log p + ζ (log Z)²
    d loss / d l = p (1 + 2 ζ log Z) - (1 - ε) onehot(t) - ε/V        (times 1 - (l/c)² under a soft cap c)

Label smoothing: Szegedy et al., arXiv 1512.00567. z-loss: PaLM, arXiv 2204.02311, section 5. Soft cap: Gemma 2,
arXiv 2408.00118. Rows of the vocabulary shared over ranks: Megatron-LM, arXiv 1909.08053.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from trainwright.torch_private import has_values, log_softmax, softmax
from trainwright.torch_private.collectives import all_gather_chunks


@dataclass(frozen=True)
class LossTerms:
    """What is added to plain cross-entropy, or done to the logits before it."""

    label_smoothing: float = 0.0
    """ε: this share of each target is spread over the whole vocabulary."""
    z_loss: float = 0.0
    """ζ: weight of (log Z)², which keeps logits from drifting; 1e-4 is usual."""
    softcap: float | None = None
    """c: logits are c tanh(logits / c) first."""


PLAIN = LossTerms()
_FAINT = 60.0
"""Losses from here on are not taken from a probability, which fp32 cannot hold beyond 87."""


@dataclass(frozen=True)
class Again:
    """How logits are had once more, after they have been overwritten.

    counts: [C, 1], which rows' losses do. logits: makes those of some rows (their numbers [n]) anew, [n, V].
    """

    counts: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class VocabularySlice:
    """Which rows of the vocabulary this rank's weight holds, where the ranks of `group` share them.

    first: the first row here. largest: rows on the rank that has the most. total: rows of all.
    """

    first: int
    largest: int
    total: int
    group: dist.ProcessGroup


def token_losses(
    logits: Float[Tensor, "C V"],
    targets: Int[Tensor, "C 1"],
    terms: LossTerms,
    slope: bool,
    vocabulary: VocabularySlice | None = None,
    again: Again | None = None,
) -> tuple[Float[Tensor, "C 1"], Float[Tensor, "C V"] | None]:
    """(loss of each token, its gradient in the logits or None without `slope`), in fp32 (fp64 for fp64 logits).

    `logits` may be overwritten.
    again: with it a CPU saves itself a pass over the logits; losses that do not count may then be wrong.
    With `vocabulary`, `logits` are of this rank's rows and targets count over all of them; collective: one all-gather
    of two or three numbers a token and rank.
    """
    if terms.softcap is not None:
        logits = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)).div(terms.softcap).tanh_().mul_(terms.softcap)
        )
    losses, gradient = (
        _whole(logits, targets, terms, slope, again)
        if vocabulary is None
        else _shared(logits, targets, terms, slope, vocabulary)
    )
    if gradient is not None and terms.softcap is not None:
        gradient.mul_(logits.div(terms.softcap).square_().neg_().add_(1.0))
    return losses, gradient


def _whole(
    logits: Tensor, targets: Tensor, terms: LossTerms, slope: bool, again: Again | None
) -> tuple[Tensor, Tensor | None]:
    smoothing, vocab_size = terms.label_smoothing, logits.shape[1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    if slope and again is not None and terms == PLAIN and logits.dtype == wide and logits.device.type == "cpu":
        return _from_probabilities(logits, targets, again)
    target = logits.gather(1, targets).to(wide) if terms.z_loss else None
    in_place = logits.dtype == wide and terms.softcap is None  # a cap's slope wants the logits again
    log_p = log_softmax(logits, out=logits) if in_place else torch.log_softmax(logits, dim=1, dtype=wide)
    of_target = log_p.gather(1, targets)
    log_z = None if target is None else target - of_target
    losses = of_target.mul_(smoothing - 1.0)
    if smoothing:
        losses -= log_p.mean(dim=1, keepdim=True).mul_(smoothing)
    if log_z is not None:
        losses += log_z.square().mul_(terms.z_loss)
    if not slope:
        return losses, None
    gradient = log_p.exp_()  # in place of the log-probabilities
    if log_z is not None:
        gradient *= log_z.mul_(2.0 * terms.z_loss).add_(1.0)
    if smoothing:
        gradient -= smoothing / vocab_size
    return losses, gradient.scatter_add_(1, targets, gradient.new_full((), smoothing - 1.0).expand(targets.shape))


def _from_probabilities(logits: Tensor, targets: Tensor, again: Again) -> tuple[Tensor, Tensor]:
    """Softmax in the logits' place is the gradient but for its targets, and its logarithm there the loss."""
    p = softmax(logits, out=logits)
    losses = p.gather(1, targets).log_().neg_()
    faint = ((losses > _FAINT) & again.counts).squeeze(1)
    if has_values(faint) and faint.any():
        rows = faint.nonzero().squeeze(1)
        losses[rows] = torch.log_softmax(again.logits(rows), dim=1, dtype=losses.dtype).gather(1, targets[rows]).neg_()
    return losses, p.scatter_add_(1, targets, p.new_full((), -1.0).expand(targets.shape))


def _shared(
    logits: Tensor, targets: Tensor, terms: LossTerms, slope: bool, vocabulary: VocabularySlice
) -> tuple[Tensor, Tensor | None]:
    smoothing = terms.label_smoothing
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here = targets - vocabulary.first
    held = (here >= 0) & (here < logits.shape[1])
    here = here.clamp(min=0, max=max(logits.shape[1] - 1, 0))
    target = logits.gather(1, here).masked_fill_(~held, 0.0) if logits.shape[1] else logits.new_zeros(here.shape)
    told = [torch.logsumexp(logits, dim=1, keepdim=True), target]
    if smoothing:
        told.append(logits.sum(dim=1, keepdim=True))
    everyone = all_gather_chunks(torch.cat(told, dim=1).unsqueeze(0), vocabulary.group)  # [N, C, 2 or 3]
    log_z = torch.logsumexp(everyone[..., 0], dim=0).unsqueeze(1)  # [C, 1]
    losses = log_z - everyone[..., 1].sum(dim=0).unsqueeze(1) * (1.0 - smoothing)
    if smoothing:
        losses -= everyone[..., 2].sum(dim=0).unsqueeze(1) * (smoothing / vocabulary.total)
    if terms.z_loss:
        losses += log_z.square() * terms.z_loss
    if not slope:
        return losses, None
    gradient = logits.sub(log_z).exp_()
    if terms.z_loss:
        gradient *= 1.0 + 2.0 * terms.z_loss * log_z
    if smoothing:
        gradient -= smoothing / vocabulary.total
    if gradient.shape[1]:
        gradient.scatter_add_(1, here, held.to(gradient.dtype).mul_(smoothing - 1.0))
    return losses, gradient
