"""A plain PyTorch loop, and the same loop on the engine: five lines differ.

    python examples/three_calls.py                                    # one process
    torchrun --nproc-per-node 2 examples/three_calls.py               # two ranks, each with its share of every batch
    torchrun --nproc-per-node 2 examples/three_calls.py --precision bf16

The model is an ordinary nn.Module that knows nothing of ranks, the optimizer an ordinary torch.optim.AdamW. On the
engine, parameters, gradients and optimizer states are sharded (ZeRO-3), and in fp32 the losses stay the same.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import trainwright as tw

BATCH_SIZE = 16
SEQUENCE_LENGTH = 64


def plain_loop(model: nn.Module, data: Dataset[tuple[Tensor, Tensor]], config: dict[str, object]) -> list[float]:
    """What one writes without any engine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(data, BATCH_SIZE)
    losses = []
    for input_ids, labels in loader:
        loss = model(input_ids, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def engine_loop(model: nn.Module, data: Dataset[tuple[Tensor, Tensor]], config: dict[str, object]) -> list[float]:
    """The same, sharded over any number of ranks, in any precision."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine = tw.initialize(model=model, optimizer=optimizer, config=config)
    loader = DataLoader(data, BATCH_SIZE // dist.get_world_size(), sampler=DistributedSampler(data, shuffle=False))
    losses = []
    for input_ids, labels in loader:
        loss = engine(input_ids, labels=labels)
        loss.backward()  # or engine.backward(loss): the same gradients
        engine.step()
        losses.append(loss.item())
    return losses


def changed_lines(before: Callable[..., object], after: Callable[..., object]) -> int:
    """Lines of code that were changed, added or taken away between two functions; comments do not count."""
    sources = [[line.split("  #")[0] for line in inspect.getsource(f).splitlines()[2:]] for f in (before, after)]
    blocks = difflib.SequenceMatcher(None, sources[0], sources[1], autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")


class ByteModel(nn.Module):
    """Predicts the next byte of a text: an embedding, two GRU layers, a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of labels [B, T] after input_ids [B, T]."""
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), labels.flatten())


class Bytes(Dataset[tuple[Tensor, Tensor]]):
    """A text's bytes, cut into `count` sequences: inputs [T] and, shifted by one, labels [T]."""

    def __init__(self, text: bytes, count: int) -> None:
        copies = 1 + count * (SEQUENCE_LENGTH + 1) // len(text)
        self._tokens = torch.tensor(list(text * copies)[: count * (SEQUENCE_LENGTH + 1)]).view(count, -1)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._tokens[index, :-1], self._tokens[index, 1:]


def over_ranks(losses: list[float]) -> list[float]:
    """The mean over the ranks: each one's loss is that of its own share of the batch."""
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def main() -> None:
    """Runs both loops from the same weights and prints their losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    options = parser.parse_args()
    data = Bytes(Path(__file__).read_bytes(), options.steps * BATCH_SIZE)
    config = {"zero": 3, "precision": options.precision}
    losses = []
    for loop in (plain_loop, engine_loop):
        torch.manual_seed(0)
        losses.append(loop(ByteModel(), data, config))
    plain, sharded = losses[0], over_ranks(losses[1])
    if dist.get_rank() != 0:
        return
    for step, (expected, found) in enumerate(zip(plain, sharded, strict=True), 1):
        print(f"step {step:3}  plain {expected:.6f}  engine on {dist.get_world_size()} rank(s) {found:.6f}")
    difference = max(abs(a - b) / a for a, b in zip(plain, sharded, strict=True))
    print(f"largest relative difference of the losses: {difference:.1e}")
    print(f"changed lines: {changed_lines(plain_loop, engine_loop)}")


if __name__ == "__main__":
    main()
