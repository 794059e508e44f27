"""The LSTM language model: embedding, LSTM layers, projection (Hochreiter and Schmidhuber 1997; Zaremba et al.,
arXiv 1409.2329, for dropout between the layers only)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainwright.errors import ConfigError
from trainwright.fused.linear import Linear, widens
from trainwright.models.cache import RecurrentState
from trainwright.models.dropout import dropout, sample_keys
from trainwright.models.head import head_output
from trainwright.models.output import LMOutput


@dataclass(frozen=True)
class LstmSettings:
    """Dimensions of an `LstmLanguageModel`; the names are those of the config's `model.lstm`."""

    vocab_size: int
    embedding_dim: int = 512
    hidden_dim: int = 1024
    layers: int = 6
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        if self.tied and self.embedding_dim != self.hidden_dim:
            raise ConfigError(
                f"tied with embedding_dim {self.embedding_dim} and hidden_dim {self.hidden_dim}",
                "a tied head needs embedding_dim = hidden_dim",
                f"embedding_dim: {self.hidden_dim}",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout {self.dropout}", "0 <= dropout < 1", "dropout: 0.1")


class LSTM(nn.LSTM):
    """nn.LSTM; on processors without instructions for a narrow format (`fused/linear.py`) the whole layer runs in fp32,
    from the narrow weights and inputs, and is rounded once at its end."""

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not widens(input):
            return super().forward(input, hx)
        wide = [weight.float() for weight in self._flat_weights if weight is not None]
        zeros = input.new_zeros(1, len(input), self.hidden_size, dtype=torch.float32)
        state = [zeros, zeros] if hx is None else [part.float() for part in hx]
        out, hidden, cell = torch.lstm(input.float(), state, wide, self.bias, 1, 0.0, self.training, False, True)
        narrow = input.dtype
        return out.to(narrow), (hidden.to(narrow), cell.to(narrow))


class LstmLanguageModel(nn.Module):
    """Embedding, `layers` LSTM layers, projection. Each layer is an nn.LSTM of its own, hence a sharding unit.

    The state starts at zero with every sequence. `labels` come already shifted.
    """

    # Hugging Face's words. The layers stay whole: a recurrence would wait for the other ranks at every position.
    _no_split_modules: ClassVar[list[str]] = ["LSTM"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "embedding": "embedding_rowwise",
        "head": "colwise_gather_output",
    }

    def __init__(self, settings: LstmSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.embedding_dim)
        self.layers = nn.ModuleList(
            LSTM(settings.embedding_dim if layer == 0 else settings.hidden_dim, settings.hidden_dim, batch_first=True)
            for layer in range(settings.layers)
        )
        self.head = Linear(settings.hidden_dim, settings.vocab_size)
        if settings.tied:
            self.head.weight = self.embedding.weight
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
        return {"model_type": "trainwright_lstm", **asdict(self.settings)}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Uniform in ±1/sqrt(width); biases zero but the forget gate's, whose sum starts at one
        (Jozefowicz et al. 2015)."""
        hidden = self.settings.hidden_dim
        bound = 1.0 / math.sqrt(hidden)
        for name, parameter in self.layers.named_parameters():
            if ".weight" in name:
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.zeros_(parameter)
            if ".bias_ih" in name:  # nn.LSTM's order of gates: input, forget, cell, output
                parameter[hidden : 2 * hidden].fill_(1.0)
        for matrix in (self.embedding.weight, self.head.weight):
            nn.init.normal_(matrix, std=1.0 / math.sqrt(matrix.shape[1]))

    def new_cache(self, batch: int, max_length: int) -> RecurrentState:
        """An empty state; an LSTM's does not grow with the sequence."""
        return RecurrentState(self.settings.layers)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        cache: RecurrentState | None = None,
        return_logits: bool = False,
        hidden: Float[Tensor, "B T D"] | None = None,
    ) -> LMOutput:
        """Logits, or with labels the loss; without a head (the first layers alone) what the last of them gives.

        hidden: that, where this module holds the later layers. Positions and documents have no meaning here and are
        left alone: the state runs on over the documents packed into a sequence."""
        batch, length = input_ids.shape
        drops = self.training and self.settings.dropout > 0.0
        keys = sample_keys(batch, input_ids.device) if drops else None
        first = 0 if cache is None else cache.length
        x = self.embedding(input_ids) if hidden is None else hidden
        layers: list[nn.Module | None] = list(self.layers)
        for number, layer in enumerate(layers):
            if layer is None:  # absent layers keep their places, so that names stay
                continue
            if keys is not None:
                x = dropout(x, self.settings.dropout, keys, layer=number, first_position=first)
            state = None if cache is None else cache.states[number]
            x, new_state = layer(x, state)
            if cache is not None:
                cache.states[number] = new_state
        if cache is not None:
            cache.length = first + length
        head: Linear | None = self.head
        return LMOutput(hidden=x) if head is None else head_output(x, head, labels, return_logits)

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOP of forward and backward a token: 6 N (Kaplan et al., arXiv 2001.08361), N all matrices but the
        embedding's look-up; the head counts. Does not depend on the sequence length."""
        matrices = sum(p.numel() for p in self.layers.parameters())
        return 6.0 * (matrices + self.settings.vocab_size * self.settings.hidden_dim)
