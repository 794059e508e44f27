"""Ulysses: attention over sequences whose tokens lie on several ranks (Jacobs et al., arXiv 2309.14509).

Before attention an all-to-all gives each rank all tokens of some heads, after it another gives back all heads of the
rank's own tokens. Attention in between is the ordinary one. Shapes: B batch, T padded sequence, N context ranks, H query
and G key/value heads on this rank before the exchange, E head width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from trainwright.models.sequence import Attend
from trainwright.parallel.collectives import all_to_all


class Ulysses:
    """Attention over slices, from attention over whole sequences."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def __call__(self, attend: Attend) -> Attend:
        """`attend` on all tokens of H/N heads; the result takes and gives all heads of T/N tokens."""

        def over_slices(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            copies = copies_of_kv_heads(q.shape[1], k.shape[1], self.ranks)
            if copies > 1:
                k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
            q, k, v = self._exchange(q, k, v)
            return self._give_back(attend(q, k, v, mask))

        return over_slices

    def _exchange(
        self, q: Float[Tensor, "B H T_local E"], k: Float[Tensor, "B G T_local E"], v: Float[Tensor, "B G T_local F"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H or G, T/N, E] -> [B, H/N or G/N, T, E]; one collective where the widths allow it."""
        if q.shape[-1] != v.shape[-1]:
            return self._to_heads(q), self._to_heads(k), self._to_heads(v)
        by_rank = [x.unflatten(1, (self.ranks, -1)) for x in (q, k, v)]  # each [B, N, heads / N, T/N, E]
        sizes = [x.shape[2] for x in by_rank]
        whole = self._to_heads(torch.cat(by_rank, dim=2).flatten(1, 2))
        first, second, third = whole.split(sizes, dim=1)
        return first, second, third

    def _to_heads(self, x: Float[Tensor, "B H T_local E"]) -> Float[Tensor, "B H_local T E"]:
        chunks = x.unflatten(1, (self.ranks, -1)).transpose(0, 1)  # [N, B, H/N, T/N, E]
        return all_to_all(chunks, self.group).movedim(0, 2).flatten(2, 3)

    def _give_back(self, x: Float[Tensor, "B H_local T E"]) -> Float[Tensor, "B H T_local E"]:
        chunks = x.unflatten(2, (self.ranks, -1)).movedim(2, 0)  # [N, B, H/N, T/N, E]
        return all_to_all(chunks, self.group).transpose(0, 1).flatten(1, 2)


def copies_of_kv_heads(heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key/value head is repeated, so that every rank gets those of its own heads/ranks query heads.

    1 where `ranks` divides `kv_heads`. `ranks` and `kv_heads` both divide `heads`.
    """
    assert heads % ranks == 0, f"{heads} heads on {ranks} context ranks"
    return ranks // math.gcd(ranks, kv_heads)
