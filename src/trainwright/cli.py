"""The command line: `trainwright prepare | train | verify | plan | launch | eval | generate | export | replay | data | doctor`.

Nothing heavy is imported before the arguments and the config are known to be right.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.cli_common import AsJson, Nproc, Overrides
from trainwright.cli_common import run_on_ranks as _run_on_ranks
from trainwright.cli_common import split as _split
from trainwright.cli_data import data_app
from trainwright.cli_launch import launch
from trainwright.cli_outer import group_from_environment, lighthouse, starts_all_groups
from trainwright.cli_plan import plan
from trainwright.cli_run import evaluate, export, generate, replay
from trainwright.cli_verify import verify
from trainwright.errors import TrainwrightError
from trainwright.facts import print_data

if TYPE_CHECKING:
    from trainwright.config import Resolved

# Typer brings its own click in newer versions: whichever it is, this is the base of its errors of usage.
_ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="trainwright",
    help="Trains language models, from a laptop to a cluster, with one engine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code. Errors of ours are printed as got / rule / remedy, without a traceback."""
    from trainwright.launch.worker import is_worker

    code = 1
    try:
        result = app(args=arguments, standalone_mode=False, prog_name="trainwright")
        code = result if isinstance(result, int) else 0
    except typer.Exit as end:
        code = end.exit_code
    except _ClickException as error:
        error.show()
        code = error.exit_code
    except TrainwrightError as error:
        if is_worker():
            raise  # the launcher reports the first failure, once
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    finally:
        distributed = sys.modules.get("trainwright.distributed")
        if distributed is not None:
            distributed.shutdown(orderly=code == 0)
    return code


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text, JSONL (text, or prompt and completion) or parquet files, folders, globs such as 'books/**/*.txt', "
            "package:NAME/FOLDER, hf:NAME for a Hugging Face dataset."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the token data set.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="tokenizer.json, its folder, GPT-2's vocab.json, or a SentencePiece .model."),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Train a byte-level BPE of this size.")] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", help="Share of documents, the last ones, kept for evaluation.")
    ] = 0.05,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of other settings.")] = False,
    as_json: AsJson = False,
) -> int:
    """Turns text into a versioned token data set. Run again after a kill it goes on where it was."""
    from trainwright.data import PrepareSettings, describe
    from trainwright.data import prepare as run

    chosen: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "held_out": held_out}
    settings = PrepareSettings(**{key: value for key, value in chosen.items() if value is not None})
    result = run(sources, out, settings, overwrite=overwrite, progress=False if as_json else None)
    facts = describe(out)
    if as_json:
        print(json.dumps(facts, default=str))
        return 0
    for note in result.notes:
        print(note)
    print_data(facts)
    print(
        f"next: trainwright train model.preset=llama-10m data.path={out} steps=500 batch.global_size=32 data.sequence_length=256"
    )
    return 0


@app.command()
def train(
    arguments: Overrides = None,
    nproc: Nproc = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config, each value's source, and end.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing on the terminal but warnings.")] = False,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts", min=0, help="Start the ranks again after a failure, from the last whole checkpoint."
        ),
    ] = 0,
) -> int:
    """Trains a model on a token data set.

    [dim]No file is needed:[/dim]  trainwright train model.preset=llama-10m data.path=data/plays steps=500 batch.global_size=32

    The run is a folder (run_dir) with config.yaml, metrics.jsonl, report.html and checkpoints. The same command again
    goes on from the newest checkpoint, on any number of ranks. Ctrl-C saves and ends. Every key: docs/config.md.
    """
    from trainwright.config import load_config
    from trainwright.config.check import check_trainable
    from trainwright.launch.signals import die_with_parent
    from trainwright.launcher_variables import read_launch
    from trainwright.monitor.sinks import check_installed
    from trainwright.run_folder import group_folder

    file, overrides = _split(arguments)
    overrides += group_from_environment(overrides)
    resolved = load_config(file, overrides)
    if print_config:
        print(resolved.to_yaml(), end="")
        return 0
    # Ranks that another launcher started look together, in run_training: one that ended here would leave the others waiting.
    launch = read_launch()
    alone = launch.world_size == 1
    if launch.launcher == "torchrun":
        die_with_parent()  # an agent that is killed leaves its ranks behind, and the others would go on waiting for them
    if alone:
        check_trainable(resolved.config)
        check_installed(resolved.config.track)
    run_dir = resolved.config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    if resolved.config.run_dir is None:
        overrides.append(f"run_dir={run_dir}")
        resolved = resolved.replace("default", run_dir=run_dir)
    if alone:
        from trainwright.preflight import preflight

        preflight(resolved.config)
    command = ["train", *([file] if file else []), *overrides, *(["--quiet"] if quiet else [])]
    outer = resolved.config.outer
    if starts_all_groups(outer.groups, outer.group):
        from trainwright.outer.launch import launch_groups

        restarts = ["--max-restarts", str(max_restarts)] if max_restarts else []
        return launch_groups([*command, *restarts], outer, run_dir, nproc)
    run_dir = str(group_folder(run_dir, outer.group))
    code = _run_on_ranks(command, nproc, Path(run_dir) / "logs", max_restarts)
    return _train_here(resolved, quiet) if code is None else code


def _train_here(resolved: Resolved, quiet: bool) -> int:
    from trainwright import distributed
    from trainwright.training_run import run_training

    result = run_training(resolved, quiet=quiet)
    if not distributed.is_main():
        return 0
    if result.status == "stopped":
        print(f"stopped at step {result.loop.engine.global_step}, saved; the same command goes on from here")
    else:
        evaluation = result.loop.last_evaluation
        if evaluation is not None and evaluation.val_bits_per_byte is not None:
            print(
                f"held-out: {evaluation.val_bits_per_byte:.4f} bits per byte (loss {evaluation.val_loss:.4f} nats a token)"
            )
    print(f"run: {result.run_dir}")
    if result.report is not None:
        print(f"report: {result.report}")
    return 0


app.command()(verify)
app.command()(lighthouse)
app.command()(plan)
app.command()(launch)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(export)
app.command()(replay)


@app.command()
def doctor(
    as_json: AsJson = False,
    folder: Annotated[Path, typer.Option("--folder", help="Where runs will be written.")] = Path("."),
    net: Annotated[
        bool,
        typer.Option(
            "--net", help="Instead: latency and bandwidth between ranks, under torchrun, srun, mpirun or --nproc."
        ),
    ] = False,
    nproc: Nproc = None,
) -> int:
    """Looks at this machine: Python, torch, backends, GPUs, memory, limits, disk, ports; each finding with its remedy."""
    from trainwright.doctor import run_doctor

    if not net:
        return run_doctor(folder, as_json=as_json)
    from trainwright.launch.run import default_nproc
    from trainwright.launcher_variables import read_launch

    if nproc is None and read_launch().launcher == "none":
        nproc = max(2, default_nproc())
    with tempfile.TemporaryDirectory() as logs:
        code = _run_on_ranks(["doctor", "--net", *(["--json"] if as_json else [])], nproc, Path(logs))
    if code is not None:
        return code
    from trainwright import distributed
    from trainwright.doctor_net import examine_net
    from trainwright.findings import tell

    findings = examine_net()
    return tell(findings, as_json) if distributed.is_main() else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
