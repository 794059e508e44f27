"""Dropout whose mask is a pure function of (seed, step, sample, layer, position, channel).

No generator state is kept or saved: a step can be replayed, a recomputed block draws the same mask, and the mask of
a sample does not depend on the batch, the rank or the micro-batch that it falls in. The bits come from a counter
through the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# SplitMix64's constants as signed 64-bit integers: torch's int64 wraps as uint64 does.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class _Key:
    seed: int
    step: int | Tensor
    sample_ids: Tensor | None


_active: ContextVar[_Key | None] = ContextVar("trainwright_dropout", default=None)


@contextlib.contextmanager
def dropout_context(seed: int, step: int | Tensor, sample_ids: Int[Tensor, " B"] | None = None) -> Iterator[None]:
    """Keys the dropout of every forward inside by `seed`, `step` and each row's sample.

    step: or int64 [] on the rows' device, which gives the same masks.
    sample_ids: [B] the samples' places in the global order; None takes the row numbers 0..B-1.
    The keys are fixed in the forward, so a recomputation in backward, outside of the context, draws the same masks.
    """
    token = _active.set(_Key(seed, step, sample_ids))
    try:
        yield
    finally:
        _active.reset(token)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: clear the copies of the sign.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64; writes into `x`."""
    x ^= _shift_right(x, 30)
    x *= _MIX_1
    x ^= _shift_right(x, 27)
    x *= _MIX_2
    x ^= _shift_right(x, 31)
    return x


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def sample_keys(batch: int, device: torch.device) -> Int[Tensor, " B"]:
    """[B] int64: the key of each row, from the context; outside of one, drawn from torch's global generator."""
    key = _active.get()
    if key is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (batch,), dtype=torch.int64, device=device)
    ids = (
        torch.arange(batch, device=device)
        if key.sample_ids is None
        else key.sample_ids.to(device=device, dtype=torch.int64)
    )
    assert ids.shape == (batch,), f"{ids.shape[0]} sample ids for a batch of {batch}"
    state = _mix(torch.full((batch,), _signed(key.seed * _GOLDEN), dtype=torch.int64, device=device))
    state = _mix(state + (key.step * _GOLDEN if isinstance(key.step, Tensor) else _signed(key.step * _GOLDEN)))
    return _mix(state + ids * _GOLDEN)


def dropout(
    x: Float[Tensor, "B T D"], rate: float, keys: Int[Tensor, " B"], layer: int, first_position: int = 0
) -> Float[Tensor, "B T D"]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate).

    keys: [B] of `sample_keys`. layer: number of this place in the model. first_position: position of x[:, 0].
    """
    _, length, width = x.shape
    pairs = (width + 1) // 2  # one 64-bit draw serves two channels
    # Positions stride by a fixed odd number, so that a mask does not depend on T.
    # `^ 0`: on what it counts itself the compiler calculates without a limit of 64 bits, and then cannot write the result.
    position = torch.arange(first_position, first_position + length, device=x.device, dtype=torch.int64) ^ 0
    channel = torch.arange(pairs, device=x.device, dtype=torch.int64) ^ 0
    counter = (position[:, None] * (1 << 24) + channel[None, :]) * _GOLDEN
    place = torch.full((1,), layer + 1, device=x.device, dtype=torch.int64) ^ 0
    stream = _mix(keys + place * _GOLDEN)
    bits = _mix(counter[None] + stream[:, None, None]).view(torch.int32)[..., :width]
    threshold = round(rate * (1 << 32)) - (1 << 31)
    keep = bits >= threshold if threshold < 1 << 31 else torch.zeros_like(bits, dtype=torch.bool)
    return x * keep.to(x.dtype).mul_(1.0 / (1.0 - rate))
