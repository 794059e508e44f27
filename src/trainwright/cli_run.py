"""`trainwright eval | generate | export | replay`: what is done with a run that was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli_common import AsJson, Nproc, run_on_ranks
from trainwright.facts import print_facts
from trainwright.run_folder import find_run


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.path=value ...]", help="Over the run's config.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Token data set; default: the run's own.")] = None,
    split: Annotated[str, typer.Option("--split", help="held_out or train.")] = "held_out",
    nproc: Nproc = None,
    as_json: AsJson = False,
) -> int:
    """Loss, perplexity and bits per byte on a whole split."""
    command = ["eval", str(run), *(overrides or []), "--split", split]
    command += [*(["--data", str(data)] if data else []), *(["--json"] if as_json else [])]
    code = run_on_ranks(command, nproc, find_run(run) / "logs")
    if code is not None:
        return code
    from trainwright import distributed
    from trainwright.inference import evaluate_on, open_run

    opened = open_run(run, overrides or ())
    found = evaluate_on(opened, data, split)
    if distributed.is_main():
        facts = {
            "checkpoint": str(opened.checkpoint),
            "split": found.split,
            "tokens": found.result.tokens,
            "loss": found.result.loss,
            "perplexity": found.result.perplexity,
            "bits_per_byte": found.bits_per_byte,
        }
        print_facts(facts, as_json)
    return 0


def generate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to continue; may be given several times.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to add.", min=1)] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.", min=0.0)] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Smallest set of tokens of this probability.", min=0.0, max=1.0)
    ] = 0.95,
    top_k: Annotated[int, typer.Option("--top-k", help="Only the k likeliest tokens; 0: all.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: AsJson = False,
) -> int:
    """Continues text with a trained model."""
    from trainwright.generate import GenerationSettings
    from trainwright.inference import generate_text, open_run

    opened = open_run(run)
    settings = GenerationSettings(
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_token=opened.dataset.eos_id,
    )
    texts = generate_text(opened, prompt, settings)
    if as_json:
        print(json.dumps([{"prompt": p, "text": t} for p, t in zip(prompt, texts, strict=True)]))
    else:
        for start, text in zip(prompt, texts, strict=True):
            print(start + text)
    return 0


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    out: Annotated[Path, typer.Argument(help="Folder for the Hugging Face model.")],
) -> int:
    """Writes the model, its config and tokenizer as a Hugging Face folder."""
    from trainwright.exporting import export_run
    from trainwright.inference import open_run

    export_run(open_run(run), out)
    print(f"{out}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int, typer.Option("--step", min=1, help="The step to run again.")],
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Show only this rank's samples.")] = None,
    nproc: Nproc = None,
    as_json: AsJson = False,
) -> int:
    """Runs a step of a run again, from the checkpoint before it, and shows the loss of each of its samples.

    By default on as many ranks as then, so that loss and gradient come out to the last bit. Nothing is written.
    """
    from trainwright import replaying

    _, ranks = replaying.point_before(run, step)
    command = ["replay", str(run), "--step", str(step), *(["--rank", str(rank)] if rank is not None else [])]
    code = run_on_ranks([*command, *(["--json"] if as_json else [])], nproc or ranks, find_run(run) / "logs")
    if code is not None:
        return code
    from dataclasses import asdict

    from trainwright import distributed

    found = replaying.replay(run, step, lambda text: print(text, file=sys.stderr) if distributed.is_main() else None)
    if distributed.is_main():
        print(json.dumps(asdict(found)) if as_json else "\n".join(replaying.describe(found, rank)))
    return 0
