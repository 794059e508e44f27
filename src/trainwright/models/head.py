"""The end of a language model: projection to the vocabulary and loss."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.fused.cross_entropy import linear_cross_entropy, summed_cross_entropy
from trainwright.fused.linear import Linear
from trainwright.models.output import LMOutput


def head_output(hidden: Float[Tensor, "B T D"], head: Linear, labels: Tensor | None, return_logits: bool) -> LMOutput:
    """The projection to the vocabulary and the loss, as all our models share them."""
    if labels is None:
        return LMOutput(logits=head(hidden))
    # A head that is a sharding unit of its own (keep_fp32: [head]) has its weight only inside its forward.
    apart = isinstance(head.weight, DTensor)
    logits = head(hidden) if apart or return_logits else None
    if apart:
        assert logits is not None
        loss_sum, tokens = summed_cross_entropy(logits, labels)
    else:
        loss_sum, tokens = linear_cross_entropy(hidden, head.weight, labels)
    return LMOutput(loss_sum / tokens.clamp(min=1), logits if return_logits else None, loss_sum, tokens)
