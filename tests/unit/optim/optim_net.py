"""A small model and its training, shared by the optimizers' tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainwright.config.schema import OptimizerConfig
from trainwright.optim.handle import OptimizerHandle


class Net(nn.Module):
    """An embedding, two hidden matrices, a norm, a head tied to the embedding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 5), generator=generator)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()


def train(model: nn.Module, handle: OptimizerHandle, steps: range) -> None:
    for step in steps:
        backward(model, step)
        handle.step()
        handle.zero_grad()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def config_of(name: str, **values: Any) -> OptimizerConfig:
    values.setdefault("weight_decay", 0.0 if name.endswith("Rprop") else 0.1)
    return OptimizerConfig(name=name, lr=values.pop("lr", 1e-2), **values)
