"""`trainwright data show | check | push | seen`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli_common import AsJson
from trainwright.facts import print_data

data_app = typer.Typer(help="Looks at a token data set, and at what a run has seen of it.", no_args_is_help=True)


@data_app.command("show")
def data_show(folder: Annotated[Path, typer.Argument(help="Token data set.")], as_json: AsJson = False) -> int:
    """Version, splits, sizes, tokenizer, and where the text came from."""
    from trainwright.data import describe

    facts = describe(folder)
    if as_json:
        print(json.dumps(facts, default=str))
    else:
        print_data(facts)
    return 0


@data_app.command("check")
def data_check(folder: Annotated[Path, typer.Argument(help="Token data set.")]) -> int:
    """Hashes every file again and compares with the manifest."""
    from trainwright.data import check

    manifest = check(folder)
    print(f"{folder}: every file is as the manifest says, version {manifest.version[:12]}")
    return 0


@data_app.command("push")
def data_push(
    folder: Annotated[Path, typer.Argument(help="Token data set.")],
    url: Annotated[str, typer.Argument(help="Where to, such as s3://bucket/plays.")],
) -> int:
    """Copies a data set to an object store, each file checked after it arrived, the manifest last."""
    from trainwright.data.remote import upload

    manifest = upload(folder, url)
    print(f"{url}: version {manifest.version[:12]}; train with data.path={url}")
    return 0


@data_app.command("seen")
def data_seen(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    steps: Annotated[str | None, typer.Option("--steps", help="first:last, or one step; default: all.")] = None,
    as_json: AsJson = False,
) -> int:
    """Which samples and documents a run was trained on; exit code 1 where any was lost or repeated."""
    from trainwright.data_seen import as_facts, describe_seen, parse_steps, seen

    found = seen(run, parse_steps(steps) if steps else None)
    print(json.dumps(as_facts(found)) if as_json else "\n".join(describe_seen(found, run)))
    return 1 if found.problems else 0
