"""Hugging Face models' SDPA attention in a narrow format on CPUs: by way of fp32 where they have no fast instructions for it, by
large products where these are faster than torch's own kernel.

Chosen by name in `transformers`' attention interface, as the model's own "sdpa" is; elsewhere, and in wide formats, it is that.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor, nn

from trainwright.fused.attention import own_attention
from trainwright.fused.linear import widens

NAME = "trainwright_narrow"


def fuse_attention(model: nn.Module) -> int:
    """Every Hugging Face model within `model` that attends by "sdpa", in place. Returns their number."""
    if "transformers" not in sys.modules:
        return 0
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    count = 0
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.config._attn_implementation != "sdpa":
            continue
        if not getattr(module, "_supports_attention_backend", False) or not module._can_set_attn_implementation():
            continue
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
        module.set_attn_implementation(NAME)
        count += 1
    return count


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """q [B, H, T, E], k and v [B, G, S, E] -> ([B, T, H, E], None)."""
    from transformers import AttentionInterface

    sdpa = AttentionInterface()["sdpa"]
    plain = attention_mask is None and _is_plain(module, query, key, value, kwargs)
    if plain and (own := own_attention(query, key, value)) is not None:
        return own(query, key, value).transpose(1, 2).contiguous(), None
    if not widens(query):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, weights = sdpa(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out.to(query.dtype), weights


def _is_plain(module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Causal attention of whole sequences, and nothing beside it."""
    asked = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if asked is None else asked)
    scale = kwargs.get("scaling")
    others = ("position_bias", "softcap", "s_aux", "sinks", "cache")
    return (
        causal
        and query.shape[2] == key.shape[2] > 1
        and query.shape[3] == value.shape[3]
        and not kwargs.get("dropout")
        and (scale is None or math.isclose(scale, query.shape[3] ** -0.5, rel_tol=1e-6))
        and all(kwargs.get(name) is None for name in others)
    )
