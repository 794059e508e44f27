"""Moments in 8 bits: blocks of 64 values, each with a scale in fp32, rounded stochastically (after Dettmers et al.,
arXiv 2110.02861, 8-bit optimizers by blocks).

A value y in [0, 1] of its block's largest becomes z = y (1 - d) + d, of which the exponent and the upper bits of the
mantissa are kept: eighths of an octave (sixteenths without a sign) where y is large, even steps where it is below d, about
2^-16. 0 and 1 are exact, and rounding up or down by chance is right on average everywhere. Of the second moment the root is
kept: its range is half as many octaves.

Blocks are of a parameter's rows, never across them: a checkpoint's codes and scales are those of any number of ranks that
share the rows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.optim.blocks import BLOCK

_ONE_BITS = 0x3F800000
_MANTISSA = 23
_NOISE = 16
_TINY = 2.0**-126
_SIGN = 128
_SIGN_SHIFT = 24


def random_bits(like: Tensor, noise: torch.Generator) -> Tensor:
    """16 of them in the int32s of a tensor of `like`'s shape; drawn 64 at a time, a quarter of the time of `randint`."""
    drawn = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    drawn.random_(-(1 << 63), None, generator=noise)
    low = drawn.view(torch.int16)[: like.numel()].to(torch.int32)
    return low.bitwise_and_((1 << _NOISE) - 1).view(like.shape)


@dataclass(frozen=True)
class _Code:
    """Values in [0, 1] as whole numbers from 0 to `highest`, `2**fine` of them an octave."""

    highest: int
    fine: int

    @property
    def _shift(self) -> int:
        return _MANTISSA - self.fine

    @property
    def _lowest_bits(self) -> int:
        return _ONE_BITS - (self.highest << self._shift)

    @property
    def _offset(self) -> float:
        return float(struct.unpack("f", struct.pack("I", self._lowest_bits))[0])

    def encode(self, value: Tensor, noise: Tensor) -> Tensor:
        """value: fp32 in [0, 1], taken as memory. noise: int32, 16 random bits, likewise. Returns int32."""
        z = value.mul_(1.0 - self._offset).add_(self._offset)
        bits = noise.bitwise_left_shift_(self._shift - _NOISE).add_(z.view(torch.int32)).sub_(self._lowest_bits)
        return bits.bitwise_right_shift_(self._shift).clamp_(0, self.highest)

    def decode(self, code: Tensor) -> Tensor:
        """code: int32, taken as memory. Returns fp32."""
        z = code.bitwise_left_shift_(self._shift).add_(self._lowest_bits).view(torch.float32)
        return z.sub_(self._offset).div_(1.0 - self._offset)


_SIGNED = _Code(127, 3)
_ROOT = _Code(255, 4)


@dataclass(frozen=True)
class EightBit:
    """A moment of n values, or a part of one: `codes` uint8 [n], `scales` fp32 [n / 64]; `squares`: it is not negative, and
    its root is kept."""

    codes: Tensor
    scales: Tensor
    squares: bool

    def read(self, wide: torch.dtype) -> Tensor:
        """[n], computed in fp32."""
        codes, scales = self.codes.to(torch.int32).view(-1, BLOCK), self.scales.unsqueeze(1)
        if self.squares:
            return _ROOT.decode(codes).mul_(scales).square_().view(-1).to(wide)
        signs = codes.bitwise_and(_SIGN).bitwise_left_shift_(_SIGN_SHIFT)
        sizes = _SIGNED.decode(codes.bitwise_and_(_SIGN - 1)).mul_(scales)
        sizes.view(torch.int32).bitwise_or_(signs)
        return sizes.view(-1).to(wide)

    def keep(self, value: Tensor, noise: torch.Generator) -> None:
        """value: [n]."""
        blocks = value.float().view(-1, BLOCK)
        bits = random_bits(blocks, noise)
        sizes = blocks.sqrt() if self.squares else blocks.abs()
        largest = sizes.amax(dim=1, keepdim=True)
        codes = (_ROOT if self.squares else _SIGNED).encode(sizes.div_(largest.clamp_min(_TINY)), bits)
        if self.squares:
            codes.clamp_min_(1)  # a root of 0 under a first moment that is none would be a step of any size
        else:
            codes.bitwise_or_((blocks.view(torch.int32) >> _SIGN_SHIFT).bitwise_and_(_SIGN))
        self.codes.copy_(codes.view(-1))
        self.scales.copy_(largest.view(-1))
