"""`trainwright plan`: the strategies that fit given machines and how fast they are, or one rank of one of them as a dry run."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright import storage
from trainwright.cli_common import AsJson, Overrides, split
from trainwright.errors import ConfigError, TrainwrightError

if TYPE_CHECKING:
    from trainwright.config import Resolved
    from trainwright.dry_run.run import DryRun


def plan(
    arguments: Overrides = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            help="Machines: 8xH100-80GB, 16x8xA100-80GB (16 nodes of 8), 8xMINE.yaml, or 2xcpu: ranks here.",
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Where the plan's time and memory go.")] = False,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Of the whole run, such as 15T or 3e11: its days and device-hours.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Of a device an hour, for --tokens.", min=0.0)] = None,
    write: Annotated[
        list[Path] | None,
        typer.Option(
            "--write",
            "--html",
            help="A new file: NAME.yaml for the config with the plan's strategy, NAME.html for a page of all.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build one rank of the real strategy on fake tensors, and take a step.")
    ] = False,
    world_size: Annotated[int | None, typer.Option("--world-size", help="Number of ranks to stand for.")] = None,
    rank: Annotated[int, typer.Option("--rank", help="Which of them.")] = 0,
    as_json: AsJson = False,
) -> int:
    """The strategy to take on given machines, its memory and its speed, and why not the others. No trial runs, no GPU.

    [dim]Such as:[/dim]  trainwright plan model.preset=llama-8b batch.global_size=128 data.sequence_length=8192 precision=bf16
    --hardware 64xH100-80GB --explain

    What the config settles (zero.stage, parallel.tensor, batch.micro_size, recompute, ...) is kept; the rest is searched.
    With --dry-run: bytes that a rank would hold and collectives that a step would issue under the config's own strategy.

    [dim]Such as:[/dim]  trainwright plan model.preset=llama-405b parallel.tensor=8 parallel.pipeline=16 zero=1
    precision=bf16 batch.micro_size=1 batch.accumulation=16 data.sequence_length=8192 --dry-run --world-size 16384
    """
    if hardware is None and not dry_run:
        raise ConfigError(
            "plan without --hardware",
            "a strategy is chosen for machines; --dry-run reckons the one that the config sets",
            "--hardware 8xH100-80GB, or --dry-run --world-size 8",
        )
    if hardware is not None:
        if dry_run:
            raise ConfigError(
                "plan with --hardware and --dry-run", "a search, or one rank of one strategy", "one of both"
            )
        wanted = _Wanted(explain, _number(tokens), price, tuple(write or ()), as_json)
        here = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?cpu\s*", hardware.lower())
        return _here(arguments, int(here[1] or 1), wanted) if here else _search(arguments, hardware, wanted)
    return _dry_run(arguments, world_size, rank, as_json)


def _dry_run(arguments: list[str] | None, world_size: int | None, rank: int, as_json: bool) -> int:
    if world_size is None:
        raise ConfigError(
            "--dry-run without --world-size", "a dry run stands for one rank of so many", "--world-size 16384"
        )
    from trainwright.config import load_config

    file, overrides = split(arguments)
    resolved = load_config(file, overrides)
    from trainwright.dry_run.run import dry_run as run
    from trainwright.planner.show_dry_run import show

    result = run(resolved, world_size, rank, vocab_size=_vocabulary(resolved))
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        show(result)
    return 0


@dataclass(frozen=True)
class _Wanted:
    explain: bool
    tokens: float | None
    price: float | None
    write: tuple[Path, ...]
    as_json: bool


def _search(arguments: list[str] | None, hardware: str, wanted: _Wanted) -> int:
    from trainwright.config import load_config
    from trainwright.planner import show as showing
    from trainwright.planner.explain import overrides as words_of
    from trainwright.planner.explain import recommended
    from trainwright.planner.from_config import job_of
    from trainwright.planner.job import Cluster
    from trainwright.planner.page import page
    from trainwright.planner.search import search

    cluster = Cluster.parse(hardware)
    _check(wanted)
    file, overrides = split(arguments)
    resolved = load_config(file, overrides)
    found = search(job_of(resolved, cluster, _vocabulary(resolved)))
    taken = recommended(found)
    if wanted.as_json:
        print(json.dumps(showing.as_json(found)))
    else:
        showing.show(found, wanted.explain, wanted.tokens, wanted.price)
    words = words_of(taken.plan, found.job) if taken is not None else []
    drawn = any(path.suffix == ".html" for path in wanted.write)
    run = None
    if taken is not None and (drawn or (wanted.explain and not wanted.as_json)):
        run = _tried(load_config(file, [*overrides, *words]), cluster.ranks)
    if run is not None and wanted.explain and not wanted.as_json:
        showing.show_run(found, run)
    for path in wanted.write:
        if path.suffix == ".html":
            path.write_text(page(found, run), encoding="utf-8")
            print(path, file=sys.stderr)
        elif taken is not None:
            _write(load_config(file, [*overrides, *words]), path)
    return 0 if taken is not None else 1


def _tried(resolved: Resolved, ranks: int) -> DryRun | None:
    """A dry run of rank 0 of the plan to take; None, and a line, where it cannot be had."""
    from trainwright.dry_run.run import dry_run as run

    print("a dry run of its rank 0 (seconds, or half a minute) ...", file=sys.stderr)
    try:
        return run(resolved, ranks, 0, vocab_size=_vocabulary(resolved))
    except TrainwrightError as error:
        print(f"no dry run of it: {error}", file=sys.stderr)
        return None


def _here(arguments: list[str] | None, ranks: int, wanted: _Wanted) -> int:
    """On so many ranks of this machine's own processors, at rates that are measured once."""
    from trainwright.config import load_config
    from trainwright.planner import show_here
    from trainwright.planner.calibrate import known_rates, rates_here
    from trainwright.planner.choose import Machines, Ways, choose_among, format_of
    from trainwright.planner.room import room_for

    _check(wanted)
    if ranks < 1:
        raise ConfigError("--hardware 0xcpu", "a rank at least", "--hardware 2xcpu")
    if wanted.tokens is not None or any(path.suffix == ".html" for path in wanted.write):
        raise ConfigError(
            "--tokens or a page with --hardware cpu",
            "both are for the catalogue's devices",
            "leave it out; --json has all",
        )
    resolved = load_config(*split(arguments))
    if known_rates(ranks, (format_of(resolved.config),)) is None:
        print("measuring this machine (15 to 30 seconds, once) ...", file=sys.stderr)
    rates, room = rates_here(ranks, (format_of(resolved.config),)), room_for(ranks)
    ways = Ways(resolved, Machines(ranks, ranks, "cpu"), rates, vocab_size=_vocabulary(resolved))
    chosen = choose_among(ways, room)
    if wanted.as_json:
        print(json.dumps(show_here.as_json(ways, chosen, room)))
    else:
        show_here.show(ways, chosen, room, wanted.explain)
    for path in wanted.write:
        _write(chosen.apply(resolved), path)
    return 0


def _write(resolved: Resolved, path: Path) -> None:
    path.write_text(resolved.to_yaml())
    print(f"{path}: trainwright train {path}", file=sys.stderr)


def _check(wanted: _Wanted) -> None:
    """Raises ConfigError for wishes that contradict each other or the disk."""
    if wanted.price is not None and wanted.tokens is None:
        raise ConfigError("--price without --tokens", "a run of so many tokens has a price", "--tokens 15e12")
    for path in wanted.write:
        if path.suffix not in (".yaml", ".yml", ".html"):
            raise ConfigError(f"--write {path}", "NAME.yaml for a config, NAME.html for a page", f"--write {path}.yaml")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--write {path}", "its folder is there", f"mkdir -p {path.parent}")
        if path.exists():
            raise ConfigError(f"--write {path}, which exists", "what is written is a new file", "another name")


_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _number(text: str | None) -> float | None:
    """Such as 15T, 1.5B or 3e11. Raises ConfigError for anything else."""
    if text is None:
        return None
    factor = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        number = float(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise ConfigError(f"--tokens {text}", "a number of tokens, with K, M, B or T behind it or not", "--tokens 15T")
    return number


def _vocabulary(resolved: Resolved) -> int | None:
    """The data set's, where there is one already."""
    data = resolved.config.data
    paths = [data.path] if data.path else [entry.path for entry in data.mix]
    if not paths or storage.is_url(paths[0]) or not (Path(paths[0]).expanduser() / "manifest.json").is_file():
        return None
    from trainwright.data.shards import TokenDataset

    return TokenDataset.open(paths[0]).vocab_size
