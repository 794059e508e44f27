"""Causal attention, within the documents of a packed sequence where these are told.

On GPUs documents are masked by blocks (FlexAttention, arXiv 2412.05496): a block of keys that no query of a block may see is
left out, so a step's cost falls with the documents' length, and no T x T mask is made. Elsewhere a mask of T x T.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainwright.fused.attention import own_attention
from trainwright.fused.linear import widens
from trainwright.torch_private.compiler import keep_saved_tensors

BLOCK = 128
"""Queries and keys of a block: FlexAttention's own default, and what its kernels are tuned for."""


class DocumentBlocks:
    """Which blocks of a packed sequence see which: FlexAttention's BlockMask of it."""

    def __init__(self, document_ids: Int[Tensor, "B T"]) -> None:
        self.block_mask = block_mask(document_ids)


Heads = tuple[int, int, int]
"""Query heads, key/value heads, and their width."""
Mask = Tensor | DocumentBlocks | None
"""What attention is allowed: [B or 1, 1, T or 1, S] bool, a sequence's documents, or None for plain causal attention."""


def attend(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B G S E"], v: Float[Tensor, "B G S E"], mask: Mask
) -> Float[Tensor, "B H T E"]:
    """Causal attention; with a mask, what it allows. A single query (T = 1) sees all S keys."""
    if isinstance(mask, DocumentBlocks):
        return _by_blocks(q, k, v, mask)
    dtype = q.dtype
    if mask is None and (own := own_attention(q, k, v)) is not None:
        return own(q, k, v)
    if widens(q):
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.to(dtype)


def attention_mask(first: int, length: int, document_ids: Tensor | None, x: Tensor, heads: Heads) -> Mask:
    """For `length` queries from position `first` on. document_ids: [B, length]. x: the residual stream, whose device and
    format decide, with the heads, how documents are masked."""
    if document_ids is None:
        if first == 0 or length == 1:
            return None
        causal = torch.ones(length, first + length, dtype=torch.bool, device=x.device).tril(first)
        return causal[None, None]
    assert first == 0, "document_ids with a cache: not meaningful, a cache holds one document"
    if _blocks_serve(heads, x, document_ids):
        return DocumentBlocks(document_ids)
    return document_mask(document_ids)


def document_mask(document_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True where attention is allowed: not ahead, and in the query's own document."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :]))[:, None]


def block_mask(document_ids: Int[Tensor, "B T"]) -> Any:
    """FlexAttention's BlockMask of causal attention within documents; T is a multiple of `BLOCK`.

    Made from the smallest and largest number in each block, without a mask of T x T: two blocks whose ranges do not meet
    see nothing of each other, two that hold one and the same document see all. Right for numbers in any order.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, length = document_ids.shape
    blocks = document_ids.view(batch, length // BLOCK, BLOCK)
    least, most = blocks.amin(-1), blocks.amax(-1)  # [B, N]
    index = torch.arange(length // BLOCK, device=document_ids.device)
    before, same = index[:, None] > index[None, :], index[:, None] == index[None, :]
    meet = (least[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= most[:, :, None])
    single = least == most
    full = before & meet & single[:, :, None] & single[:, None, :]
    partial = (before | same) & meet & ~full

    def allowed(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _listed(blocks: Bool[Tensor, "B N N"]) -> tuple[Int[Tensor, "B 1 N"], Int[Tensor, "B 1 N N"]]:
    """How many blocks of keys each block of queries sees, and which: the seen first, in order."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None].contiguous(), order[:, None].contiguous()


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    keep_saved_tensors()  # a backward in halves, or one with retain_graph, goes over them twice
    return torch.compile(flex_attention)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: DocumentBlocks) -> Tensor:
    words = {"block_mask": mask.block_mask, "enable_gqa": q.shape[1] != k.shape[1]}
    if torch.compiler.is_compiling():  # a compiled block has it compiled with the rest
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, **words)
    return _flex()(q, k, v, **words)


def _blocks_serve(heads: Heads, x: Tensor, document_ids: Tensor) -> bool:
    length = document_ids.shape[1]
    if x.device.type != "cuda" or x.dtype == torch.float64 or length % BLOCK:
        return False
    key = (*heads, x.dtype, x.device)
    if key not in _served:
        _served[key] = _tried(heads, x, document_ids)
    return _served[key]


_served: dict[tuple[Any, ...], bool] = {}


def _tried(heads: Heads, x: Tensor, document_ids: Tensor) -> bool:
    """Whether forward and backward work here, once, on what a layer will bring. What cannot be compiled is found out before
    a step needs it, and said."""
    batch, length = document_ids.shape
    query, key_value, width = heads
    with torch.enable_grad():
        q, k, v = (
            torch.zeros(batch, n, length, width, dtype=x.dtype, device=x.device, requires_grad=True)
            for n in (query, key_value, key_value)
        )
        try:
            _by_blocks(q, k, v, DocumentBlocks(document_ids)).sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            warnings.warn(
                f"FlexAttention cannot be compiled here ({type(error).__name__}: {first[0] if first else ''}): documents are "
                "kept apart by a mask of T x T, which takes more time and memory on long sequences",
                stacklevel=2,
            )
            return False
    return True
