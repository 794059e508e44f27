"""The outer step between groups of ranks, on plain tensors: formats on the link, the update, what is made of a late one.

DiLoCo (Douillard et al., arXiv 2311.08105): after H inner steps the outer gradient is the mean over the groups of
(synchronised - own weights), and a Nesterov SGD step on the synchronised weights follows. Streaming DiLoCo (arXiv
2501.18512) applies it some steps late. Error feedback (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847): what
the format on the link rounds off is added to the next outer gradient, so that nothing is lost for good.

Legend: n values, a multiple of BLOCK.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

BLOCK = 256
"""Values that share a scale under int8 and int4. Parameters begin at multiples of it, so that a block is of one parameter alone."""

Format = Literal["fp32", "bf16", "int8", "int4"]
_SCALE_BYTES = 4
_LARGEST = {"int8": 127.0, "int4": 7.0}


def payload_bytes(count: int, dtype: Format) -> int:
    """Bytes of `count` values (a multiple of BLOCK) on the link: 4, 2, or 1 or 1/2 and 4 / BLOCK each."""
    assert count % BLOCK == 0, f"{count} values are not whole blocks of {BLOCK}"
    if dtype in _LARGEST:
        return (count if dtype == "int8" else count // 2) + count // BLOCK * _SCALE_BYTES
    return count * (4 if dtype == "fp32" else 2)


def encode(values: Float32[Tensor, " n"], dtype: Format) -> UInt8[Tensor, " bytes"]:
    """`values` as they travel. int8: every block's scales first, fp32, then every block's values, rounded to nearest;
    the scale is the largest magnitude / 127, so that an error is at most half of it. int4: the same with 7, two values a
    byte, the first in its lower half."""
    assert values.dtype == torch.float32, f"outer gradients are fp32, got {values.dtype}"
    if dtype == "fp32":
        return values.contiguous().view(torch.uint8)
    if dtype == "bf16":
        return values.to(torch.bfloat16).view(torch.uint8)
    blocks = values.view(-1, BLOCK)
    largest = _LARGEST[dtype]
    scales = blocks.abs().amax(dim=1, keepdim=True) / largest
    quotients = blocks / torch.where(scales > 0, scales, 1.0)
    rounded = quotients.round_().clamp_(-largest, largest).to(torch.int8).view(-1).view(torch.uint8)
    if dtype == "int4":
        rounded = (rounded[::2] & 15) | (rounded[1::2] << 4)
    return torch.cat([scales.view(-1).view(torch.uint8), rounded])


def decode(payload: UInt8[Tensor, " bytes"], count: int, dtype: Format) -> Float32[Tensor, " n"]:
    """The `count` values that `payload` stands for: the same bits wherever it is decoded."""
    if dtype == "fp32":
        return payload.view(torch.float32)
    if dtype == "bf16":
        return payload.view(torch.bfloat16).to(torch.float32)
    split = count // BLOCK * _SCALE_BYTES
    scales = payload[:split].clone().view(torch.float32)
    rounded = payload[split:]
    if dtype == "int4":  # an arithmetic shift brings the sign along
        rounded = torch.stack([rounded << 4, rounded], dim=1).view(torch.int8) >> 4
    values = rounded.view(torch.int8).to(torch.float32).view(-1, BLOCK)
    return (values * scales[:, None]).view(-1)


def encode_with_feedback(
    gradient: Float32[Tensor, " n"], residual: Float32[Tensor, " n"] | None, dtype: Format
) -> UInt8[Tensor, " bytes"]:
    """Encodes gradient + residual, and leaves in `residual` what the format rounded off. None (fp32): nothing is."""
    if residual is None:
        return encode(gradient, dtype)
    whole = gradient + residual
    payload = encode(whole, dtype)
    torch.sub(whole, decode(payload, whole.numel(), dtype), out=residual)
    return payload


def nesterov_(weights: Tensor, momentum: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
    """One outer step, in place: m <- decay m + g; w <- w - lr (g + decay m). That of torch.optim.SGD(nesterov=True)."""
    momentum.mul_(decay).add_(gradient)
    weights.sub_(gradient.add(momentum, alpha=decay), alpha=lr)


def late_weights(synchronised: Tensor, own: Tensor, sent: Tensor | None, own_share: float | None) -> Tensor:
    """A group's weights after an outer step that comes late: `own` have gone on from `sent` in the meantime.

    own_share None: synchronised + (own - sent), the inner steps made since, again from the new weights. Otherwise
    Streaming DiLoCo's mix, own_share of `own` and the rest of `synchronised`. sent None: not late, `synchronised`.
    """
    if own_share is not None:
        return torch.lerp(synchronised, own, own_share)
    if sent is None:
        return synchronised.clone()
    return synchronised + (own - sent)
