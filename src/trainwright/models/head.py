"""The end of a language model: projection to the vocabulary and loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.fused.cross_entropy import linear_cross_entropy, summed_cross_entropy
from trainwright.fused.linear import Linear
from trainwright.fused.token_losses import PLAIN, LossTerms
from trainwright.models.output import LMOutput


def head_output(hidden: Float[Tensor, "B T D"], head: Linear, labels: Tensor | None, return_logits: bool) -> LMOutput:
    """The projection to the vocabulary and the loss, as all our models share them."""
    if labels is None:
        return LMOutput(logits=head(hidden))
    loss_sum, tokens = head_loss(hidden, head, labels)
    return LMOutput(loss_sum / tokens.clamp(min=1), head(hidden) if return_logits else None, loss_sum, tokens)


def head_of(module: nn.Module) -> nn.Linear | None:
    """The projection to the vocabulary of our models and of Hugging Face's; None where there is none, or it has a bias."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Linear) and head.bias is None else None


def head_loss(
    hidden: Float[Tensor, "*batch D"], head: Any, labels: Int[Tensor, "*batch"], softcap: float | None = None
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(Σ cross-entropy of softmax(head(hidden)) against labels over the valid tokens, their number); `head` has no bias.

    A head that is cut over ranks brings a `fused_loss(hidden, labels, terms)` of its own. In training, what `head.loss_terms`
    says is added. softcap: c, where the logits are c tanh(logits / c).
    """
    terms: LossTerms = getattr(head, "loss_terms", PLAIN) if head.training else PLAIN
    if softcap is not None:
        terms = replace(terms, softcap=softcap)
    fused = getattr(head, "fused_loss", None)
    if fused is not None:
        found: tuple[Tensor, Tensor] = fused(hidden, labels, terms)
        return found
    # A head that is a sharding unit of its own (keep_fp32: [head]) has its weight, and its format, only inside its forward.
    if isinstance(head.weight, DTensor) or head.weight.dtype != hidden.dtype:
        return summed_cross_entropy(head(hidden), labels, terms)
    return linear_cross_entropy(hidden, head.weight, labels, terms=terms)
