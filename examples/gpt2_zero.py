"""GPT-2 under ZeRO, fp16 and accumulated gradients: the usual loop, until the model knows a poem by heart.

    python examples/gpt2_zero.py                                      # one process, a small GPT-2 on bytes, offline
    torchrun --nproc-per-node 2 examples/gpt2_zero.py --stage 3       # two ranks, another ZeRO stage
    python examples/gpt2_zero.py --weights FOLDER                     # the pretrained gpt2, with its tokenizer
    python examples/gpt2_zero.py --text my.txt --epochs 40

FOLDER holds a GPT-2 as `save_pretrained` or the hub's files lay it down (config.json, model.safetensors, tokenizer.json).
The loss that is printed is the mean over the epoch's tokens, of all ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

import trainwright as tw

CONFIG = {
    "zero": {"stage": 2},
    "precision": "fp16",
    "batch": {"accumulation": 4},
    "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0},
    "lr_schedule": {"name": "linear", "warmup_steps": 10},
    "gradient_clipping": 1.0,
}
MICRO_BATCH = 4  # sequences a forward pass, over all ranks; four of these are one optimizer step

# William Shakespeare, Sonnet 18 (1609).
POEM = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.
"""


def small_model() -> GPT2LMHeadModel:
    """A GPT-2 of 0.2M parameters on bytes. Without dropout: it is to learn by heart."""
    settings = GPT2Config(
        vocab_size=256, n_positions=256, n_embd=96, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh", initializer_range=0.08, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(settings)


def model_and_tokens(text: str, weights: Path | None) -> tuple[GPT2LMHeadModel, Tensor]:
    """The model, and the text as token ids [length]: bytes, or those of the pretrained model's tokenizer."""
    if weights is None:
        return small_model(), torch.tensor(list(text.encode()))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    model = GPT2LMHeadModel.from_pretrained(weights, local_files_only=True)
    return model, torch.tensor(tokenizer(text)["input_ids"])


def windows(tokens: Tensor, length: int, multiple: int) -> Tensor:
    """Overlapping sequences [count, length] that cover the text evenly; count is a multiple of `multiple`, at least 8 x."""
    length = min(length, len(tokens))
    count = -(-max(8 * multiple, 4 * len(tokens) // length) // multiple) * multiple
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[start : start + length] for start in starts])


def train(model: tw.Engine, data: Tensor, epochs: int) -> list[float]:
    """The loop; returns the mean loss of each epoch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sampler: DistributedSampler[Tensor] = DistributedSampler(data, seed=0)  # type: ignore[arg-type]
    loader = DataLoader(data, MICRO_BATCH // world_size, sampler=sampler)  # type: ignore[arg-type]
    means = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        losses = []
        for batch in loader:
            loss = model(batch, labels=batch).loss
            loss.backward()
            model.step()  # updates the weights after every fourth call
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        means.append(mean.item() / world_size)
        if rank == 0:
            print(f"Epoch: {epoch}, Loss: {means[-1]:.4f}", flush=True)
    return means


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of a pretrained GPT-2; else a small random one")
    parser.add_argument("--text", type=Path, help="what to learn; else a sonnet")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage: 0, 1, 2 or 3")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--lr", type=float, help="learning rate; default 3e-3, with --weights 1e-4")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8") if options.text else POEM
    module, tokens = model_and_tokens(text, options.weights)
    module.loss_type = "ForCausalLM"  # what transformers falls back to for GPT-2, with a message
    accumulation = CONFIG["batch"]["accumulation"]
    data = windows(tokens, options.length, multiple=accumulation * MICRO_BATCH)
    config = CONFIG | {
        "zero": {"stage": options.stage},
        "steps": options.epochs * len(data) // (accumulation * MICRO_BATCH),
    }
    lr = options.lr or (1e-4 if options.weights else 3e-3)
    config["optimizer"] = {"name": "adamw", "lr": lr, "weight_decay": 0.0}
    model = tw.initialize(model=module, config=config)
    if MICRO_BATCH % dist.get_world_size():
        parser.error(f"{dist.get_world_size()} ranks do not divide a micro-batch of {MICRO_BATCH} sequences")
    train(model, data, options.epochs)
    model.close()


if __name__ == "__main__":
    main()
