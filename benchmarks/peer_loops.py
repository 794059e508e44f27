"""One training loop a function, each as its own users write it: what `peers.py` times. Runs one of them in this process.

    python benchmarks/peer_loops.py PEER --vocab-size 8192 --steps 5      # or under torchrun

Model: Llama's shape, D 384, 6 layers, T 256; AdamW, clipping at 1. B micro-batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LENGTH = 256
SIZES = {"dim": 384, "layers": 6, "heads": 6, "ffn_dim": 1024}
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0


@dataclass
class Shape:
    """What all peers train."""

    vocab_size: int
    rows: int
    """Sequences a rank and step."""
    steps: int
    """With the warm-up."""
    precision: str
    ends: list[float] = field(default_factory=list)
    """When each step ended."""

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    def batch(self, step: int, shifted: bool = False) -> dict[str, Tensor]:
        """[rows, T] tokens of this rank, the same for every peer. shifted: labels are the next tokens, as our models take
        them; Hugging Face's shift them inside."""
        rank = int(os.environ.get("RANK", "0"))
        generator = torch.Generator().manual_seed(1000 * step + rank)
        tokens = torch.randint(0, self.vocab_size, (self.rows, LENGTH), generator=generator)
        labels = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), dim=1) if shifted else tokens.clone()
        return {"input_ids": tokens, "labels": labels}

    def tick(self) -> None:
        self.ends.append(time.perf_counter())


def llama(shape: Shape) -> nn.Module:
    """Hugging Face's, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=SIZES["dim"], intermediate_size=SIZES["ffn_dim"],
        num_hidden_layers=SIZES["layers"], num_attention_heads=SIZES["heads"], num_key_value_heads=SIZES["heads"],
        max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(shape: Shape, model: Callable[[], nn.Module], stage: int, shifted: bool, **more: Any) -> float:
    import trainwright as tw

    config = {
        "precision": shape.precision, "zero": stage, "gradient_clipping": CLIP,
        "optimizer": {"lr": LR, "betas": BETAS, "weight_decay": DECAY}, **more,
    }  # fmt: skip
    engine = tw.initialize(model=model, config=config)
    loss = 0.0
    for step in range(shape.steps):
        loss = engine.train_batch(shape.batch(step, shifted))
        shape.tick()
    return loss


def _transformer(shape: Shape) -> Callable[[], nn.Module]:
    from trainwright.models.transformer import Transformer, TransformerSettings

    sizes = {**SIZES, "kv_heads": SIZES["heads"], "head_dim": SIZES["dim"] // SIZES["heads"]}
    return lambda: Transformer(TransformerSettings(vocab_size=shape.vocab_size, **sizes))


def trainwright(shape: Shape, stage: int) -> float:
    """Our engine on our model, compiled."""
    return _ours(shape, _transformer(shape), stage, shifted=True, compile=True)


def trainwright_eager(shape: Shape, stage: int) -> float:
    """The same without torch.compile."""
    return _ours(shape, _transformer(shape), stage, shifted=True)


def trainwright_hf(shape: Shape, stage: int) -> float:
    """Our engine on Hugging Face's model, its code unchanged."""
    return _ours(shape, lambda: llama(shape), stage, shifted=False)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def _loop(
    shape: Shape,
    model: Any,
    optimizer: torch.optim.Optimizer,
    autocast: bool,
    clip: Callable[[], Any],
    shifted: bool = False,
) -> float:
    loss = torch.zeros(())
    for step in range(shape.steps):
        with torch.autocast("cpu", dtype=shape.dtype, enabled=autocast and shape.precision != "fp32"):
            loss = model(**shape.batch(step, shifted)).loss
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        shape.tick()
    return loss.item()


def plain(shape: Shape, stage: int, compiled: bool = False) -> float:
    """torch's own loop with autocast, one process."""
    model = llama(shape)
    run = torch.compile(model) if compiled else model
    return _loop(
        shape, run, adamw(model.parameters()), True, lambda: nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    )


def plain_compiled(shape: Shape, stage: int) -> float:
    """The same under torch.compile."""
    return plain(shape, stage, compiled=True)


def _start() -> None:
    """The process group; torchrun's variables, or those of one rank alone."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    os.environ.update({**alone, **os.environ})
    dist.init_process_group("gloo")


def ddp(shape: Shape, stage: int) -> float:
    """DistributedDataParallel."""
    _start()
    model = nn.parallel.DistributedDataParallel(llama(shape))
    return _loop(
        shape, model, adamw(model.parameters()), True, lambda: nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    )


def fsdp2(shape: Shape, stage: int, fused: bool = False) -> float:
    """fully_shard by hand, bf16 compute, fp32 reduction; the parameters kept after forward below stage 3."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _start()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=shape.dtype, reduce_dtype=torch.float32)
    model: Any = _transformer(shape)() if fused else llama(shape)
    for block in model.blocks if fused else model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == 3)
        if fused:
            block.compile()
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    return _loop(shape, model, adamw(model.parameters()), False, clip, shifted=fused)


def fsdp2_fused(shape: Shape, stage: int) -> float:
    """fully_shard by hand on our model: the same fused loss and compiled blocks."""
    return fsdp2(shape, stage, fused=True)


# --- the others ------------------------------------------------------------------------------------------------------


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, shape: Shape, world_size: int) -> None:
        self.rows = [row for step in range(shape.steps) for row in self._of(shape, step, world_size)]

    def _of(self, shape: Shape, step: int, world_size: int) -> list[dict[str, Tensor]]:
        batch = shape.batch(step)
        return [{key: value[i] for key, value in batch.items()} for i in range(shape.rows) for _ in range(world_size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def hf_trainer(shape: Shape, stage: int) -> float:
    """transformers.Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            shape.tick()

    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=shape.rows, max_steps=shape.steps, bf16=shape.precision == "bf16",
        learning_rate=LR, weight_decay=DECAY, adam_beta2=BETAS[1], max_grad_norm=CLIP, use_cpu=True, report_to=[],
        logging_steps=shape.steps, save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(llama(shape), arguments, train_dataset=_Rows(shape, world_size), callbacks=[Clock()])
    return float(trainer.train().training_loss)


def hf_accelerate(shape: Shape, stage: int) -> float:
    """accelerate's prepare, autocast and clipping."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if shape.precision == "bf16" else "no", cpu=True)
    model = llama(shape)
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    loss = torch.zeros(())
    for step in range(shape.steps):
        loss = model(**shape.batch(step)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        shape.tick()
    return loss.item()


def deepspeed(shape: Shape, stage: int) -> float:
    """DeepSpeed's engine at `stage`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _start()
    import deepspeed as ds

    config = {
        "train_micro_batch_size_per_gpu": shape.rows, "gradient_clipping": CLIP, "zero_optimization": {"stage": stage},
        "bf16": {"enabled": shape.precision == "bf16"}, "steps_per_print": 10**9,
    }  # fmt: skip
    model = llama(shape)
    engine, *_ = ds.initialize(model=model, optimizer=adamw(model.parameters()), config=config)
    loss = torch.zeros(())
    for step in range(shape.steps):
        loss = engine(**shape.batch(step)).loss
        engine.backward(loss)
        engine.step()
        shape.tick()
    return loss.item()


PEERS: dict[str, Callable[[Shape, int], float]] = {
    "trainwright": trainwright, "trainwright_eager": trainwright_eager, "trainwright_hf": trainwright_hf, "plain": plain,
    "plain_compiled": plain_compiled, "ddp": ddp, "fsdp2": fsdp2, "fsdp2_fused": fsdp2_fused, "hf_trainer": hf_trainer,
    "accelerate": hf_accelerate, "deepspeed": deepspeed,
}  # fmt: skip
NEEDS = {"hf_trainer": "accelerate", "accelerate": "accelerate", "deepspeed": "deepspeed"}


def _megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    given = parser.parse_args()
    shape = Shape(given.vocab_size, given.rows, given.steps, given.precision)
    import transformers.models.llama.modeling_llama  # noqa: F401  every peer's import, before the baseline

    baseline = _megabytes()
    loss = PEERS[given.peer](shape, given.stage)
    steps = [b - a for a, b in zip(shape.ends, shape.ends[1:], strict=False)]
    if int(os.environ.get("RANK", "0")) == 0:
        found = {"seconds": steps, "loss": loss, "peak_mb": _megabytes(), "baseline_mb": baseline}
        print("RESULT " + json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)  # what follows in a peer's teardown is not timed, and not ours


if __name__ == "__main__":
    main()
