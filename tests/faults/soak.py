"""A run that is killed again and again: `python -m soak [--kills 30] [--worlds 2] [--seed 0]`.

Trains one run to its end while a random rank (now and then the launcher) is killed by SIGKILL at random moments, start-up,
steps and saves alike, and starts it again each time with the next number of ranks of --worlds. Then compares it with an
undisturbed run: every step's samples, every step's loss, and at one number of ranks the final weights bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.data_seen import seen
from trainwright.monitor.metrics import read_metrics

STEPS, EVERY, BATCH = 240, 4, 8
_DEADLINE_S = 90.0


def settings(data: Path, run_dir: Path, steps: int = STEPS) -> list[str]:
    """The run's command line."""
    return [
        "model.transformer={layers: 2, dim: 32, heads: 4, head_dim: 8, ffn_dim: 64}", f"data={{path: {data}, sequence_length: 32}}",
        f"batch={{global_size: {BATCH}, micro_size: 2}}", f"steps={steps}", "optimizer.lr=3e-3", "lr_schedule=cosine", "zero=2",
        "gradient_clipping=1.0", f"checkpoint={{every: {EVERY}, keep: 2}}", "evaluate.final_batches=1", f"run_dir={run_dir}",
    ]  # fmt: skip


def prepare_data(folder: Path) -> Path:
    """A small token data set."""
    from trainwright.data import PrepareSettings, prepare

    for index in range(12):
        (folder / f"{index:02d}.txt").write_text(" ".join(f"word{(i * i * 7 + index * 13) % 193}" for i in range(900)))
    out = folder / "tokens"
    prepare([str(folder / "*.txt")], out, PrepareSettings(vocab_size=300, held_out=0.1), progress=False)
    return out


@dataclass
class Soak:
    """What happened to the run."""

    kills: int = 0
    of_launcher: int = 0
    starts: int = 0
    worlds: list[int] = field(default_factory=list)
    longest_end_s: float = 0.0
    """From a kill to the end of the launcher."""
    outputs: list[str] = field(default_factory=list)


def start(command: Sequence[str], world: int) -> subprocess.Popen[str]:
    """`trainwright train` on `world` ranks."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainwright.cli", "train", *command, "--nproc", str(world), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def ranks_of(launcher: int) -> list[int]:
    """The launcher's workers; of a launch of one rank the process itself."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    found = [int(row[0]) for row in rows if int(row[1]) == launcher and "trainwright.launch.worker" in row[2]]
    return found or [launcher]


def steps_done(run_dir: Path) -> int:
    """Lines of steps in metrics.jsonl."""
    try:
        return sum(line.startswith('{"kind": "step"') for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def disturb(
    command: Sequence[str], run_dir: Path, worlds: Sequence[int], kills: int, rng: random.Random, last: int
) -> Soak:
    """Trains to the end through `kills` kills."""
    soak = Soak()
    while True:
        world = worlds[soak.starts % len(worlds)]
        soak.starts += 1
        soak.worlds.append(world)
        process = start(command, world)
        if soak.kills < kills and steps_done(run_dir) < last - 20:
            _kill(process, run_dir, soak, rng)
        text, _ = process.communicate(timeout=300)
        soak.outputs.append(text)
        left = [pid for pid in ranks_of(process.pid) if pid != process.pid]
        assert not left, f"orphans {left} of {process.pid}"
        if process.returncode == 0:
            return soak
        assert soak.starts <= kills + 3, f"the run fails by itself:\n{text}"


def _kill(process: subprocess.Popen[str], run_dir: Path, soak: Soak, rng: random.Random) -> None:
    """Kills a rank at a random moment: while it starts, or a random while after its first step."""
    before = steps_done(run_dir)
    deadline = time.monotonic() + _DEADLINE_S
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0.5, 4.0))
    else:
        while steps_done(run_dir) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
    if process.poll() is not None:
        return
    launcher = rng.random() < 0.15
    victim = process.pid if launcher else rng.choice(ranks_of(process.pid))
    os.kill(victim, signal.SIGKILL)
    at = time.monotonic()
    process.wait(timeout=60)
    soak.kills += 1
    soak.of_launcher += int(victim == process.pid)
    soak.longest_end_s = max(soak.longest_end_s, time.monotonic() - at)


def files_of(run_dir: Path, step: int) -> dict[str, str]:
    """Hashes of the checkpoint's files, as its manifest says."""
    manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def compare(disturbed: Path, whole: Path, last: int) -> dict[str, Any]:
    """The two runs side by side."""
    ours, theirs = (read_metrics(path).steps for path in (disturbed, whole))
    found = seen(disturbed)
    return {
        "steps": [len(ours), len(theirs)],
        "same_samples": found.samples.tolist() == seen(whole).samples.tolist() and not found.problems,
        "loss_error": max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True)),
        "same_weights": files_of(disturbed, last) == files_of(whole, last),
    }


def soak(folder: Path, kills: int, worlds: Sequence[int], seed: int, steps: int = STEPS) -> tuple[Soak, dict[str, Any]]:
    """The whole of it."""
    data = prepare_data(folder)
    whole = start(settings(data, folder / "whole", steps), worlds[0])
    text, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, text
    rng = random.Random(seed)
    found = disturb(settings(data, folder / "disturbed", steps), folder / "disturbed", worlds, kills, rng, steps)
    return found, compare(folder / "disturbed", folder / "whole", steps)


def main() -> int:
    """Prints what happened; 0 where nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--worlds", default="2", help="numbers of ranks, one start after another: 1,2,3,4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    worlds = [int(world) for world in arguments.worlds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        found, compared = soak(Path(folder), arguments.kills, worlds, arguments.seed, arguments.steps)
    print(
        f"{found.kills} kills ({found.of_launcher} of the launcher) in {found.starts} starts, ranks {found.worlds}, "
        f"{time.monotonic() - began:.0f} s; longest from a kill to the launcher's end {found.longest_end_s:.1f} s"
    )
    print(json.dumps(compared))
    exact = len(set(worlds)) > 1 or compared["same_weights"]
    return 0 if exact and compared["same_samples"] and compared["loss_error"] <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
