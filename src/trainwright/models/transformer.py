"""The Llama-family decoder: RMSNorm, rotary embedding, SwiGLU, grouped-query attention.

Touvron et al., LLaMA (arXiv 2302.13971); Ainslie et al., GQA (arXiv 2305.13245); Su et al., RoPE (arXiv 2104.09864);
QK-norm as in Qwen3. The parameter layout maps one to one onto Hugging Face's Llama (`checkpoint/export.py`).
Knows nothing of ranks; the tables at the head of `Transformer` are for whoever cuts it.

Shapes: B batch, T sequence, D model, H heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainwright.errors import ConfigError
from trainwright.fused.elementwise import RMSNorm, rotate, swiglu
from trainwright.fused.linear import Linear
from trainwright.models.attention import Mask, attend, attention_mask, document_mask
from trainwright.models.cache import KeyValueCache
from trainwright.models.dropout import dropout, sample_keys
from trainwright.models.head import head_output
from trainwright.models.output import LMOutput
from trainwright.models.residual import ResidualCut, ResidualSlice
from trainwright.models.rotary import Rotary
from trainwright.models.sequence import Attend, active_slice


@dataclass(frozen=True)
class TransformerSettings:
    """Dimensions of a `Transformer`; the names are those of the config's `model.transformer`."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tied: bool = True
    dropout: float = 0.0
    max_sequence_length: int = 2048

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads {self.heads} with kv_heads {self.kv_heads}",
                "kv_heads divides heads",
                f"kv_heads: {math.gcd(self.heads, self.kv_heads)}",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim {self.head_dim}", "head_dim is even (RoPE turns pairs)", f"head_dim: {self.head_dim + 1}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout {self.dropout}", "0 <= dropout < 1", "dropout: 0.1")


@dataclass(frozen=True)
class BlockInputs:
    """What all blocks of a forward share beside the residual stream. Not a pytree on purpose: nothing in it is cast.

    position_ids: [B, T] or None for first..first+T-1. mask: as `attend` takes it; [B or 1, 1, T, S] bool with an `attend` of another's.
    dropout_keys: [B] int64 or None for no dropout. attend: attention; of a slice, one that reaches beyond it.
    """

    first: int = 0
    position_ids: Tensor | None = None
    mask: Mask = None
    dropout_keys: Tensor | None = None
    cache: KeyValueCache | None = None
    attend: Attend = attend
    residual: ResidualSlice | None = None

    @property
    def residual_first(self) -> int:
        """Position of the residual stream's first row."""
        return self.first if self.residual is None else self.first + self.residual.first

    def whole(self, x: Tensor) -> Tensor:
        """The residual stream [B, S, D] as [B, T, D]: the same where it is not cut."""
        return x if self.residual is None else self.residual.whole(x)


class Attention(nn.Module):
    """Causal self-attention; H query heads share G key/value heads."""

    def __init__(self, settings: TransformerSettings, layer: int, rotary: Rotary) -> None:
        super().__init__()
        self.settings, self.layer = settings, layer
        query, key_value = settings.heads * settings.head_dim, settings.kv_heads * settings.head_dim
        self.q = Linear(settings.dim, query)
        self.k = Linear(settings.dim, key_value)
        self.v = Linear(settings.dim, key_value)
        self.out = Linear(query, settings.dim)
        if settings.qk_norm:
            self.q_norm = RMSNorm(settings.head_dim, eps=settings.norm_eps)
            self.k_norm = RMSNorm(settings.head_dim, eps=settings.norm_eps)
        self.rotary = rotary

    def forward(self, x: Float[Tensor, "B T D"], inputs: BlockInputs) -> Float[Tensor, "B T D"]:
        batch, length, _ = x.shape
        width = self.settings.head_dim
        q = self.q(x).view(batch, length, -1, width)  # [B, T, H, E]
        k = self.k(x).view(batch, length, -1, width)  # [B, T, G, E]
        v = self.v(x).view(batch, length, -1, width)
        if self.settings.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rotary.tables(inputs.first, length, inputs.position_ids)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)  # [B, H, T, E]
        v = v.transpose(1, 2)
        if inputs.cache is not None:
            k, v = inputs.cache.append(self.layer, k, v)
        out = inputs.attend(q, k, v, inputs.mask)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.gate = Linear(settings.dim, settings.ffn_dim)
        self.up = Linear(settings.dim, settings.ffn_dim)
        self.down = Linear(settings.ffn_dim, settings.dim)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down(swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """One layer: pre-norm attention and feed-forward on the residual stream."""

    def __init__(self, settings: TransformerSettings, layer: int, rotary: Rotary) -> None:
        super().__init__()
        self.layer, self.rate = layer, settings.dropout
        self.attention_norm = RMSNorm(settings.dim, eps=settings.norm_eps)
        self.attention = Attention(settings, layer, rotary)
        self.ffn_norm = RMSNorm(settings.dim, eps=settings.norm_eps)
        self.ffn = FeedForward(settings)

    def _drop(self, x: Tensor, inputs: BlockInputs, place: int) -> Tensor:
        if inputs.dropout_keys is None:
            return x
        first = inputs.residual_first
        return dropout(x, self.rate, inputs.dropout_keys, layer=2 * self.layer + place, first_position=first)

    def forward(self, x: Float[Tensor, "B T D"], inputs: BlockInputs) -> Float[Tensor, "B T D"]:
        x = x + self._drop(self.attention(inputs.whole(self.attention_norm(x)), inputs), inputs, 0)
        return x + self._drop(self.ffn(inputs.whole(self.ffn_norm(x))), inputs, 1)


class Transformer(nn.Module):
    """A decoder language model. `labels` come already shifted: labels[b, t] is the target of position t."""

    # Hugging Face's words, so that one table serves their models and ours.
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "embedding": "embedding_rowwise",
        "head": "colwise_gather_output",
        "blocks.*.attention.q": "colwise",
        "blocks.*.attention.k": "colwise",
        "blocks.*.attention.v": "colwise",
        "blocks.*.attention.q_norm": "replicated_with_grad_allreduce",
        "blocks.*.attention.k_norm": "replicated_with_grad_allreduce",
        "blocks.*.attention.out": "rowwise",
        "blocks.*.ffn.gate": "colwise",
        "blocks.*.ffn.up": "colwise",
        "blocks.*.ffn.down": "rowwise",
    }
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embedding": (["input_ids"], ["x"]),
        "blocks": (["x", "inputs"], ["x"]),
        "norm": (["x"], ["x"]),
    }

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.dim)
        self.rotary = Rotary(settings.head_dim, settings.rope_theta)
        self.blocks = nn.ModuleList(Block(settings, layer, self.rotary) for layer in range(settings.layers))
        self.norm = RMSNorm(settings.dim, eps=settings.norm_eps)
        self.head = Linear(settings.dim, settings.vocab_size)
        if settings.tied:
            self.head.weight = self.embedding.weight
        self.residual_cut: ResidualCut | None = None
        self.init_weights()

    def get_output_embeddings(self) -> Linear | None:
        """The projection to the vocabulary, under Hugging Face's name; None in a part without it."""
        return self.head

    @property
    def vocab_size(self) -> int:
        return self.settings.vocab_size

    @property
    def config(self) -> dict[str, Any]:
        """What it takes to build this model again."""
        return {"model_type": "trainwright_transformer", **asdict(self.settings)}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal, std sqrt(2 / 5D) (Nguyen and Salazar, arXiv 1910.05895); what writes into the residual stream is
        divided by sqrt(2 layers) (GPT-2). Norms start at one."""
        std = math.sqrt(2.0 / (5.0 * self.settings.dim))
        residual_std = std / math.sqrt(2.0 * self.settings.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=residual_std if writes else std)

    def new_cache(self, batch: int, max_length: int) -> KeyValueCache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        return KeyValueCache(self.settings.layers, batch, max_length)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        cache: KeyValueCache | None = None,
        return_logits: bool = False,
        hidden: Float[Tensor, "B T D"] | None = None,
    ) -> LMOutput:
        """Logits, or with labels the loss; without a head (the first layers alone) the residual stream.

        labels: already shifted, -100 where there is none. document_ids: tokens see only their own document's.
        cache: keys and values of the tokens before; `input_ids` continue them, and the cache grows.
        hidden: the residual stream that earlier layers made of `input_ids`, where this module holds the later ones.
        """
        batch, length = input_ids.shape
        place = active_slice()
        first = cache.length if cache is not None else place.first if place is not None else 0
        reach = first + length
        if position_ids is not None:
            reach = max(reach, self.settings.max_sequence_length)
        self.rotary.prepare(reach, input_ids.device)
        x = self.embedding(input_ids) if hidden is None else hidden
        if place is None:
            s = self.settings
            mask = attention_mask(first, length, document_ids, x, (s.heads, s.kv_heads, s.head_dim))
        else:
            mask = None if place.document_ids is None else document_mask(place.document_ids)
        drops = self.training and self.settings.dropout > 0.0
        inputs = BlockInputs(
            first=first,
            position_ids=position_ids,
            mask=mask,
            dropout_keys=sample_keys(batch, input_ids.device) if drops else None,
            cache=cache,
            attend=attend if place is None else place.attention(attend),
            residual=None if self.residual_cut is None else self.residual_cut(length),
        )
        for block in self.blocks:
            if block is not None:  # absent blocks keep their places, so that names stay
                x = block(x, inputs)
        if cache is not None:
            cache.length = first + length
        head: Linear | None = self.head
        if head is None:
            return LMOutput(hidden=x)
        return head_output(inputs.whole(self.norm(x)), head, labels, return_logits)

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOP of forward and backward a token: 6 N + 12 L H E T (PaLM, arXiv 2204.02311, appendix B; recomputation
        and the causal half not discounted). N: all matrices but the embedding's look-up; the head counts."""
        settings = self.settings
        matrices = sum(p.numel() for p in self.blocks.parameters()) + settings.vocab_size * settings.dim
        return 6.0 * matrices + 12.0 * settings.layers * settings.heads * settings.head_dim * sequence_length
