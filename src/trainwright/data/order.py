"""The order of training: a pure permutation of (data set version, seed, epoch), in O(1) memory and O(1) seek.

A Feistel network is a permutation whatever its round function is (Luby & Rackoff 1988, "How to construct
pseudorandom permutations from pseudorandom functions"). Over 2 x `half_bits` bits it permutes [0, 4^half_bits); cycle
walking (Black & Rogaway 2002, "Ciphers with arbitrary finite domains") restricts it to [0, n): an index that falls
outside is put through again until it falls inside. 4^half_bits < 4n, so that takes under 4 passes on average. The
round function is the finaliser of SplitMix64 (Steele, Lea & Flood 2014) over the half and a round key from SHA-256.
This is shuffling, not cryptography.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Order", "SampleOrder", "permute"]

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
Indices = npt.NDArray[np.int64]


def _round_keys(version: str, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """The 64-bit keys of the rounds, [_ROUNDS], from SHA-256 of (version, seed, epoch)."""
    text = f"trainwright order 1\0{version}\0{seed}\0{epoch}"
    data = b"".join(hashlib.sha256(f"{text}\0{part}".encode()).digest() for part in range(_ROUNDS * 8 // 32))
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        mixed = right + key  # unsigned arithmetic wraps modulo 2^64, as SplitMix64 wants
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right


def permute(indices: Any, n: int, *, version: str, seed: int, epoch: int) -> Indices:
    """Where the permutation of [0, n) for (version, seed, epoch) sends each of `indices`, an int64 array of any shape.

    Raises ValueError for an index outside [0, n).
    """
    given = np.asarray(indices, dtype=np.int64)
    if n < 1 or (given.size and (given.min() < 0 or given.max() >= n)):
        raise ValueError(f"indices must lie in [0, {n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(version, seed, epoch)
    result = _feistel(given.reshape(-1).astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(result >= n)
    while outside.size:
        walked = _feistel(result[outside], half_bits, keys)
        result[outside] = walked
        outside = outside[walked >= n]
    return result.astype(np.int64).reshape(given.shape)


class Order(ABC):
    """An endless sequence of samples, in stretches of one length whose samples are found without those before them."""

    stretch: int

    def sample_at(self, position: int) -> int:
        """The sample at `position`."""
        return int(self.samples(position, 1)[0])

    def samples(self, start: int, count: int) -> Indices:
        """The samples at positions start … start+count-1, int64 [count]; may span stretches."""
        if start < 0 or count < 0:
            raise ValueError("positions are counted from 0")
        result = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            number, offset = divmod(start + done, self.stretch)
            take = min(count - done, self.stretch - offset)
            result[done : done + take] = self._of_stretch(number, offset, take)
            done += take
        return result

    @abstractmethod
    def _of_stretch(self, number: int, offset: int, count: int) -> Indices:
        """`count` samples of stretch `number` from `offset` on, all inside it."""


class SampleOrder(Order):
    """The endless sequence of samples of a split of `n`: epoch after epoch, each a permutation of its own.

    The sample at a position: epoch = position // n, index = the epoch's permutation of position % n.
    `shuffle=False` visits 0 … n-1 in every epoch.
    """

    def __init__(self, n: int, *, version: str, seed: int, shuffle: bool = True) -> None:
        if n < 1:
            raise ValueError("an order needs at least one sample")
        self.n = self.stretch = n
        self.version, self.seed, self.shuffle = version, seed, shuffle

    def _of_stretch(self, number: int, offset: int, count: int) -> Indices:
        indices = np.arange(offset, offset + count, dtype=np.int64)
        if not self.shuffle:
            return indices
        return permute(indices, self.n, version=self.version, seed=self.seed, epoch=number)
