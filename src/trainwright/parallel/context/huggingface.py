"""Hugging Face models under context parallelism: an attention of their registry that reaches beyond the slice.

`transformers` lets a model's attention be chosen by name (its attention interface). Ours is torch's SDPA; while the
model is given slices of sequences, that is carried over whole sequences by the slice's own `attention`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.errors import ModelError
from trainwright.models.pretrained import PreShiftedCausalLM, shifts_labels
from trainwright.models.sequence import SequenceSlice, active_slice

NAME = "trainwright_context"

# Models whose positions are 0..T-1, learned; beside them all those with rotary embeddings are known to be so.
_LEARNED_POSITIONS = frozenset({"gpt2", "bert"})
# What other models hand to attention beyond queries, keys, values and mask; None and 0 ask for nothing.
_UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "cache")


def prepare_huggingface(module: nn.Module, ranks: int) -> dict[str, int]:
    """Makes the module take slices of sequences. Returns what must divide over the ranks: name -> query heads.

    Raises ModelError for a module that is not known to come out right.
    """
    config: Any = _check_model(module, ranks)
    _register()
    model: Any = module
    model.set_attn_implementation(NAME)
    module.register_forward_pre_hook(_add_positions, with_kwargs=True)
    return {"num_attention_heads": int(config.num_attention_heads)}


def _check_model(module: nn.Module, ranks: int) -> Any:
    got = f"parallel.context={ranks} with {type(module).__name__}"
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        known = isinstance(module, PreTrainedModel)
    else:
        known = False
    if not known:
        raise ModelError(
            got,
            "attention has to reach beyond a rank's slice: our Transformer and Hugging Face models can",
            "parallel.context=1, or parallel.tensor",
        )
    model: Any = module
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ModelError(
            got + ", an encoder-decoder model",
            "its two sequences, cross-attention and relative positions are not cut along the sequence here",
            "parallel.context=1, or a causal or masked language model",
        )
    if not _loss_is_of_tokens(module) or getattr(config, "output_router_logits", False):
        raise ModelError(
            got + ", whose loss is not that of its tokens alone",
            "the loss is the mean cross-entropy of a causal or masked language model's logits",
            "parallel.context=1; output_router_logits=False for a mixture of experts",
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            got + ", whose attention is its own code",
            "attention goes through transformers' attention interface, where it can be replaced",
            "parallel.context=1, or a model such as Llama, Qwen3 or GPT-2",
        )
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ModelError(
            got + f", which has layers of type {', '.join(sorted(others))}",
            "every layer that mixes tokens is full or sliding-window attention",
            "parallel.context=1",
        )
    rotary = any(name.endswith("rotary_emb") for name, _ in module.named_modules())
    if not rotary and config.model_type not in _LEARNED_POSITIONS:
        raise ModelError(
            got + f" (type {config.model_type}), whose positions are counted in its own way",
            f"rotary embeddings, or the learned positions of {', '.join(sorted(_LEARNED_POSITIONS))}",
            "parallel.context=1",
        )
    return config


def _loss_is_of_tokens(module: nn.Module) -> bool:
    from transformers.models.auto import modeling_auto

    names = {base.__name__ for base in type(module).__mro__}
    masked = names & set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    return isinstance(module, PreShiftedCausalLM) or shifts_labels(module) or bool(masked)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _add_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the forward on a slice: where its tokens stand, and a mask that hides nothing (the slice knows what is
    hidden; without one, transformers would look for packed documents in the slice's positions)."""
    place = active_slice()
    if place is None:
        return args, kwargs
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    batch, local = tokens.shape[:2]
    if kwargs.get("position_ids") is None:
        positions = torch.arange(place.first, place.first + local, device=tokens.device)
        # Fill-up tokens take the last position: a table of learned ones may end there.
        kwargs["position_ids"] = positions.clamp(max=place.length - 1).expand(batch, local)
    kwargs["attention_mask"] = torch.ones(batch, local, dtype=torch.bool, device=tokens.device)
    kwargs.setdefault("use_cache", False)
    return args, kwargs


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """q [B, H, T, E], k and v [B, G, T, E] of the slice -> ([B, T, H, E], None)."""
    place = active_slice()
    if place is None:
        from transformers import AttentionInterface

        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}",
            "attention over slices of sequences is softmax(scale q k + mask) v",
            "parallel.context=1",
        )
    asked = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if asked is None else asked)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
            is_causal=causal and mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    return place.attention(attend)(query, key, value, attention_mask).transpose(1, 2).contiguous(), None


def _mask(**arguments: Any) -> Tensor | None:
    """The mask of a forward, by transformers' mask functions: [B or 1, 1, T or 1, T] bool over whole sequences, padded;
    None where plain causal (or unmasked) attention will do."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    place = active_slice()
    if place is None:
        return AttentionMaskInterface()["sdpa"](**arguments)
    function = arguments["mask_function"]
    if arguments.get("use_vmap"):
        raise ModelError(
            "a mask that the model puts together from its own inputs",
            "masks over slices of sequences are functions of the positions alone",
            "parallel.context=1",
        )
    device = arguments["device"]
    keys = _visible_keys(place, device)
    if function is bidirectional_mask_function and place.document_ids is None:
        if keys is None and place.padded_length > place.length:
            keys = (torch.arange(place.padded_length, device=device) < place.length)[None]
        return None if keys is None else keys[:, None, None, :]
    if function is causal_mask_function and place.document_ids is None and keys is None:
        return None
    index = torch.arange(place.padded_length, device=device)
    row = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    mask = function(row, row, index[None, None, :, None], index[None, None, None, :])
    if place.document_ids is not None:
        documents = place.document_ids
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask if keys is None else mask & keys[:, None, None, :]


def _visible_keys(place: SequenceSlice, device: torch.device) -> Tensor | None:
    return None if place.valid is None else place.valid.to(device)
