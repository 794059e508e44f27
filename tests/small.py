"""Small models, batches and the plain unsharded loop that the distributed tests compare with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.checkpoint.weights import initialise
from trainwright.models.deferred import build_on_meta
from trainwright.models.transformer import Transformer, TransformerSettings
from trainwright.parallel.allocate import allocate

VOCAB = 37


class Residual(nn.Module):
    """A block: x + W2 gelu(W1 norm(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Awkward(nn.Module):
    """Everything that sharding has to bear at once: tied head, an unused and a frozen layer, a buffer, a block called
    twice, odd dimensions, and a block that is left out where `skip` says so."""

    def __init__(self, dim: int = 10, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Residual(dim) for _ in range(blocks))
        self.frozen = nn.Linear(dim, dim)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, dim))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, skip: bool = False) -> dict[str, Tensor]:
        x = self.embedding(input_ids) + self.offset
        for index, block in enumerate(self.blocks):
            if not (skip and index == 1):
                x = block(x)
        x = self.blocks[0](self.frozen(x))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return {"loss": F.cross_entropy(wide.flatten(0, 1), labels.flatten()), "logits": logits}


def transformer(**changes: Any) -> Transformer:
    """A two-block Llama of odd sizes."""
    settings = {
        "vocab_size": VOCAB, "dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn_dim": 40, "tied": True,
    }  # fmt: skip
    return Transformer(TransformerSettings(**(settings | changes)))


def with_values(build: Any, seed: int = 0) -> nn.Module:
    """What `initialize(model=build)` starts from, in one unsharded module."""
    module = build_on_meta(build, seed)
    allocate(module, torch.device("cpu"))
    initialise(module, seed)
    return module


def batches(steps: int, rows: int = 12, length: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of the global batch of each step; 40% of the labels and the whole first row are ignored."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (rows, length), generator=generator)
        labels = torch.randint(0, VOCAB, (rows, length), generator=generator)
        labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
        labels[0] = -100
        found.append((tokens, labels))
    return found


def mean_loss(output: Any) -> Tensor:
    """The loss of whatever a forward returned."""
    return output["loss"] if isinstance(output, dict) else output.loss


def plain_loop(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], lr: float = 1e-2, clip: float | None = 1.0
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of torch's own loop on the whole batch: AdamW, no decay below 2-D."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    losses, norms = [], []
    for tokens, labels in data:
        loss = mean_loss(model(tokens, labels=labels))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: t.detach().clone() for name, t in model.state_dict().items()}


def three_calls(engine: Any, tokens: Tensor, labels: Tensor, plain: bool = False) -> None:
    """A step by forward, backward, step; plain: by the habit of `loss.backward()` and one step() at the boundary."""
    count = engine.parts.accumulation
    for x, y in zip(tokens.tensor_split(count), labels.tensor_split(count), strict=True):
        loss = mean_loss(engine(x, labels=y))
        if plain:
            loss.backward()
        else:
            engine.backward(loss)
            engine.step()
    if plain:
        engine.step()


def share(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's rows of a global batch that divides."""
    rows = len(tensor) // world_size
    return tensor[rank * rows : (rank + 1) * rows]


def relative(found: float, expected: float) -> float:
    """|found - expected| / |expected|."""
    return abs(found - expected) / max(abs(expected), 1e-30)
