"""`trainwright verify`: arguments, ranks, printing. The work is in `verification/`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.cli_common import AsJson, Nproc, Overrides, run_on_ranks, split

if TYPE_CHECKING:
    from trainwright.config import Resolved

_RESULT = "TRAINWRIGHT_VERIFY_RESULT"
"""File into which rank 0 writes what it found, for the process that started the ranks."""


def verify(
    arguments: Overrides = None,
    nproc: Nproc = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every composition of strategies, models and formats that fits the ranks.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps to compare.", min=1)] = 5,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Make the config's model and batch small, so that they fit one process.")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", help="With --matrix: cases whose name holds this text, such as 'gpt2'.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Proves a strategy: the same steps under the config's strategy and in one unsharded process, compared.

    Losses, each parameter's gradient and final values, the global norm, copies, tied weights and the samples that each
    rank saw; first in float64, then in the config's own format. Ends with 1 when something does not hold, naming the
    parameter, its layout and the rank. Tolerances and their reasons: docs/verify.md.
    """
    from trainwright.config import load_config

    file, overrides = split(arguments)
    resolved = load_config(file, overrides)
    command = ["verify", *([file] if file else []), *overrides, "--steps", str(steps)]
    command += [*(["--matrix"] if matrix else []), *(["--shrink"] if shrink else []), *(["--json"] if as_json else [])]
    command += ["--only", only] if only is not None else []
    with tempfile.TemporaryDirectory(prefix="trainwright-verify-") as folder:
        result = Path(folder) / "result.json"
        before = os.environ.get(_RESULT)
        os.environ[_RESULT] = before or str(result)
        try:
            code = run_on_ranks(command, nproc, Path(folder) / "logs")
        finally:
            if before is None:
                os.environ.pop(_RESULT, None)
        if code is not None:
            return _verdict(result, as_json) if code == 0 else code
    return _verify_here(resolved, steps, matrix, shrink, only, as_json)


def _verdict(result: Path, as_json: bool) -> int:
    """What the ranks found: rank 0 has printed it, but for JSON."""
    found: dict[str, Any] = json.loads(result.read_text())
    if as_json:
        print(json.dumps(found))
    return 0 if found["ok"] else 1


def _verify_here(resolved: Resolved, steps: int, matrix: bool, shrink: bool, only: str | None, as_json: bool) -> int:
    """On this rank, all ranks together. Ranks of ours end with 0: the verdict is in the file."""
    from trainwright import distributed
    from trainwright.launch.worker import is_worker

    found = _matrix(resolved, steps, only, as_json) if matrix else _one(resolved, steps, shrink, as_json)
    result = os.environ.get(_RESULT)
    if distributed.is_main():
        if is_worker() and result:
            Path(result).write_text(json.dumps(found))
        elif as_json:
            print(json.dumps(found))
    return 0 if is_worker() or found["ok"] else 1


def _one(resolved: Resolved, steps: int, shrink: bool, as_json: bool) -> dict[str, Any]:
    from trainwright import distributed
    from trainwright.verification.show import show_verification
    from trainwright.verification.verify import verify as run

    found = run(config=resolved, steps=steps, shrink=shrink)
    if distributed.is_main() and not as_json:
        show_verification(found)
    return {"rows": [found.to_json()], "ok": found.ok, "time_s": round(found.time_s, 1)}


def _matrix(resolved: Resolved, steps: int, only: str | None, as_json: bool) -> dict[str, Any]:
    from trainwright import distributed
    from trainwright.verification.matrix import run_matrix
    from trainwright.verification.show import MatrixProgress, show_matrix

    distributed.start(resolved.config.parallel.backend)
    printing = distributed.is_main() and not as_json
    with MatrixProgress(printing) as progress:
        found = run_matrix(resolved, steps, only=only, report=progress)
    if printing:
        show_matrix(found)
    return found.to_json()
