"""What a run says of itself: before its first step, and summary.json and samples at its end."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist

from trainwright.config import Config
from trainwright.data.mix import open_dataset
from trainwright.data.shards import TokenDataset
from trainwright.fused.linear import widens
from trainwright.generate import GenerationSettings
from trainwright.monitor.metrics import read_metrics, write_summary
from trainwright.optim.groups import local_tensor
from trainwright.precision.policy import DTYPES, build_policy
from trainwright.run_model import describe_strategy
from trainwright.train import TrainingLoop

_PROMPT_TOKENS = 24
_SAMPLES = 2


def sample_texts(loop: TrainingLoop, new_tokens: int = 160) -> list[dict[str, Any]]:
    """Continuations of the beginnings of held-out documents (or training ones). Collective."""
    if getattr(loop.engine.module, "vocab_size", None) is None:  # no language model of one stream of tokens
        return []
    if loop.engine.parts.mesh.degrees.pipeline > 1:  # no rank holds the model: `trainwright generate` opens the run
        return []
    dataset = open_dataset(loop.resolved.config.data)
    split = loop.held_out or dataset.split("train")
    length = min(_PROMPT_TOKENS, split.num_tokens, max(1, loop.resolved.config.data.sequence_length // 2))
    new_tokens = max(1, min(new_tokens, loop.resolved.config.data.sequence_length - length))
    starts = [i * (split.num_tokens - length) // _SAMPLES for i in range(_SAMPLES)]
    prompts = [split.read(start, length)[0].tolist() for start in starts]
    settings = GenerationSettings(
        max_new_tokens=new_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=loop.resolved.config.seed,
        stop_token=dataset.eos_id,
    )
    with loop.engine.averaged_weights():
        output = loop.engine.generate(prompts, settings)
    tokenizer = dataset.load_tokenizer()
    return [
        {"prompt": tokenizer.decode(p), "text": tokenizer.decode(row), "settings": "temperature 0.8, top-p 0.95"}
        for p, row in zip(prompts, output, strict=True)
    ]


def summarise(
    loop: TrainingLoop, status: str, samples: list[dict[str, Any]], plan: dict[str, Any] | None = None
) -> None:
    """Writes summary.json for the report. plan: what was planned and what was measured, where both are known."""
    config = loop.resolved.config
    dataset = open_dataset(config.data)
    steps = read_metrics(loop.run_dir).steps
    train, held_out = dataset.split("train"), dataset.split("held_out")
    last, evaluation = loop.last_record, loop.last_evaluation
    degrees = loop.engine.parts.mesh.degrees
    summary: dict[str, Any] = {
        "name": loop.run_dir.name,
        "status": status,
        "training_time_s": loop.training_time_s,
        "steps": loop.engine.global_step,
        "tokens": loop.engine.tokens_seen,
        "parameters": loop.parameters,
        "flops_per_token": loop.flops_per_token,
        "world_size": dist.get_world_size(),
        "strategy": describe_strategy(config, degrees),
        "precision": config.precision.dtype,
        "data": {
            "name": dataset.path.name,
            "path": str(dataset.path),
            "version": dataset.version,
            "tokens": train.num_tokens + held_out.num_tokens,
            "documents": train.num_documents + held_out.num_documents,
            "splits": {"train": train.num_tokens, "heldout": held_out.num_tokens},
            "vocab_size": dataset.vocab_size,
        },
        "samples": samples,
        "plan": plan,
        "final": {
            "loss": last.loss if last else None,
            "val_loss": evaluation.val_loss if evaluation else None,
            "val_bits_per_byte": evaluation.val_bits_per_byte if evaluation else None,
            "tokens_per_s": statistics.median(s["tokens_per_s"] for s in steps) if steps else None,
            "mfu": statistics.median(s["mfu"] for s in steps if s["mfu"] is not None)
            if any(s["mfu"] for s in steps)
            else None,
        },
    }
    write_summary(loop.run_dir, summary)


def introduce(loop: TrainingLoop, dataset: TokenDataset) -> None:
    """What a reader wants to know before the first step."""
    config = loop.resolved.config
    train = dataset.split("train")
    strategy = describe_strategy(config, loop.engine.parts.mesh.degrees)
    loop.console.say(
        f"{loop.parameters / 1e6:,.2f}M parameters, {strategy} ({loop.engine.device.type}); "
        f"{train.num_tokens:,} training tokens in {train.num_documents:,} documents, version {dataset.version[:12]}"
    )
    loop.console.say(
        f"{loop.plan.global_size} sequences of {config.data.sequence_length} tokens a step: {loop.plan.accumulation} "
        f"micro-batch(es) of {loop.plan.micro_size} a rank; "
        + (
            f"{loop.steps:,} steps, {loop.steps * loop.plan.stride / loop.loader.num_sequences:.2f} epochs"
            if loop.steps
            else "no horizon"
        )
    )
    for text in (loop.engine.parts.model.describe(), loop.engine.parts.update.optimizer.describe()):
        if text:
            loop.console.say(text)
    on_disk = config.offload.masters == "disk"
    policy = build_policy(config.precision, on_disk)
    loop.console.dtype_table(policy.table(config.keep_fp32, _moments(config), config.precision.float8, on_disk))
    if config.offload.parameters == "disk":
        loop.console.say(
            f"offload: {_shard_bytes(loop) / 1e6:,.0f} MB of parameters a rank in files; a gather reads what the page cache does not hold"
        )
    if "disk" in (config.offload.optimizer, config.offload.parameters) and config.checkpoint.asynchronous:
        loop.console.say(
            "checkpoints are written while training waits: a copy of the state in memory is what offload avoids"
        )
    if widens(torch.empty(0, dtype=DTYPES[config.precision.dtype], device=loop.engine.device)):
        loop.console.say(
            f"this processor has no fast {config.precision.dtype} instructions: matrix products go through fp32 and are rounded "
            "once, as native ones are; no faster than precision=fp32"
        )


def _shard_bytes(loop: TrainingLoop) -> int:
    """Of this rank's shards of the parameters."""
    return sum(local_tensor(p).nbytes for _, p in loop.engine.parts.update.parameters)


def _moments(config: Config) -> str | None:
    """The moments' format where it is not the masters'."""
    if config.optimizer.moments == "8bit":
        return "8 bits, a scale for every 64 (matrices; the rest fp32)"
    return config.optimizer.moments or (None if config.precision.master == "fp32" else "bf16")
