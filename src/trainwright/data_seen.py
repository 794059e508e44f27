"""`trainwright data seen RUN --steps a:b`: which samples and documents a run was trained on in those steps.

Two things say it together: metrics.jsonl, how many samples had been handed out after each step, and the order of
training, a pure function of the data set's version and the seed (`data/order.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainwright.config import Config, load_config
from trainwright.data.mix import open_dataset
from trainwright.data.shards import TokenSplit
from trainwright.errors import DataError, DataVersionError
from trainwright.monitor.metrics import Metrics, read_metrics
from trainwright.run_folder import CONFIG_NAME, find_run

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """What steps `first` to `last` were trained on."""

    first: int
    last: int
    start: int
    """Position of the first global batch in the endless order."""
    stop: int
    """That behind the last one. Of a run of one group `samples[i]` is at start + i; a group's share of each global batch is
    a run of its rows."""
    samples: Numbers
    """Samples of the training split, in the order of training."""
    of_step: Numbers
    """The step of each of them."""
    num_sequences: int
    """Samples of an epoch."""
    documents: dict[int, int]
    """Document of the data set -> its tokens among those that were seen, counted as often as they were."""
    problems: tuple[str, ...]
    """Samples lost or repeated, steps without a record; empty where all is as it should be."""


def parse_steps(text: str) -> tuple[int, int]:
    """ "3:7" as steps 3 to 7, "5" as step 5 alone. Raises DataError."""
    first, _, last = text.partition(":")
    try:
        found = int(first), int(last or first)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise DataError(f"--steps {text}", "first:last, both counted from 1, or one step", "--steps 1:10")
    return found


def seen(run: str | Path, steps: tuple[int, int] | None = None) -> Seen:
    """Of a run's folder; None: of all its steps. Raises DataError, CheckpointError where there is no run."""
    folder = find_run(run)
    config = load_config(folder / CONFIG_NAME).config
    metrics = read_metrics(folder)
    after = {int(line["step"]): int(line["samples"]) for line in metrics.steps}
    if not after:
        raise DataError(f"{folder} has no step yet", "what was seen is told by metrics.jsonl", "train first")
    first, last = steps or (min(after), max(after))
    if last not in after or first not in after:
        raise DataError(
            f"steps {first} to {last} of {folder}",
            f"metrics.jsonl has steps {min(after)} to {max(after)}",
            f"--steps {min(after)}:{max(after)}",
        )
    alone = int(metrics.header.get("groups", 1)) == 1  # a group that was away has made none of those steps
    problems = [f"step {s} is not in metrics.jsonl" for s in range(first, last + 1) if s not in after and alone]
    parts = []
    for steps_of_part, launch in _parts(metrics, first, last):
        split = _split(config, folder, str(launch.get("data_version")))
        parts.append(_part(split, config, launch, steps_of_part, after, problems))
    documents: dict[int, int] = {}
    for part in parts:
        for number, tokens in part.documents.items():
            documents[number] = documents.get(number, 0) + tokens
    samples, of_step = (np.concatenate([getattr(part, name) for part in parts]) for name in ("samples", "of_step"))
    return Seen(
        first,
        last,
        parts[0].start,
        parts[-1].stop,
        samples,
        of_step,
        parts[-1].num_sequences,
        dict(sorted(documents.items())),
        tuple(problems),
    )


def _parts(metrics: Metrics, first: int, last: int) -> list[tuple[range, dict[str, Any]]]:
    """Runs of steps that one order of the data holds for, and what held then."""
    found: list[tuple[range, dict[str, Any]]] = []
    for step in range(first, last + 1):
        launch = metrics.launch_of(step)
        if found and all(found[-1][1].get(key) == launch.get(key) for key in _OF_THE_ORDER):
            found[-1] = range(found[-1][0].start, step + 1), launch
        else:
            found.append((range(step, step + 1), launch))
    return found


_OF_THE_ORDER = ("data_version", "seed", "shuffle", "sequence_length", "global_size", "group", "groups")


def _part(
    split: TokenSplit, config: Config, launch: dict[str, Any], steps: range, after: dict[int, int], problems: list[str]
) -> Seen:
    """What steps of one order were trained on; adds to `problems`."""
    length, size = int(launch["sequence_length"]), int(launch["global_size"])
    count = split.num_sequences(length)
    group, groups = int(launch.get("group", 0)), int(launch.get("groups", 1))
    stride = size * groups
    done = [s for s in steps if s in after]
    order = split.order(length, int(launch.get("seed", config.seed)), bool(launch.get("shuffle", config.data.shuffle)))
    problems += [
        f"step {s} ended at sample {after[s]:,}, expected {after[before] + stride:,}"
        for before, s in pairwise(done)
        if after[s] != after[before] + stride
    ]
    start, stop = after[done[0]] - stride, after[done[-1]]
    if groups == 1:
        positions = np.arange(start, stop, dtype=np.int64)
        samples = order.samples(start, stop - start)
        of_step = np.repeat(np.arange(steps[0], steps[0] + len(samples) // size, dtype=np.int64), size)
    else:
        firsts = [after[s] - stride + group * size for s in done]
        positions = np.concatenate([np.arange(first, first + size, dtype=np.int64) for first in firsts])
        samples = np.concatenate([order.samples(first, size) for first in firsts])
        of_step = np.repeat(np.array(done, dtype=np.int64), size)
    if not config.data.mix:  # in a mix every set has its own epochs
        problems += _repeats(samples, positions // count)
    documents = _documents(split, samples, length)
    return Seen(steps[0], steps[-1], start, stop, samples, of_step, count, documents, ())


def _split(config: Config, folder: Path, version: str) -> TokenSplit:
    dataset = open_dataset(config.data)
    if dataset.version != version:
        raise DataVersionError(
            f"{dataset.path} has version {dataset.version[:12]}, {folder} was trained on {version[:12]}",
            "what was seen is told by the data that it was trained on",
            "bring back the data set of that version",
        )
    return dataset.split("train")


def _repeats(samples: Numbers, epochs: Numbers) -> list[str]:
    """In words: the samples that an epoch holds more than once. epochs: that of each."""
    found = []
    for epoch in np.unique(epochs):
        values, times = np.unique(samples[epochs == epoch], return_counts=True)
        twice = values[times > 1]
        if len(twice):
            found.append(f"epoch {epoch + 1}: {len(twice):,} samples more than once, first {twice[0]}")
    return found


def _documents(split: TokenSplit, samples: Numbers, length: int) -> dict[int, int]:
    """Tokens by document: predicted from, in samples of `length`."""
    found: dict[int, int] = {}
    values, times = np.unique(samples, return_counts=True)
    for sample, count in zip(values, times, strict=True):
        _, _, numbers = split.read(split.sequence_start(int(sample), length), length)
        for number, tokens in zip(*np.unique(numbers, return_counts=True), strict=True):
            found[int(number)] = found.get(int(number), 0) + int(tokens) * int(count)
    return dict(sorted(found.items()))


def describe_seen(found: Seen, run: str | Path, most: int = 30) -> list[str]:
    """Lines for people."""
    config = load_config(find_run(run) / CONFIG_NAME).config
    dataset = open_dataset(config.data)
    lines = [
        f"steps {found.first} to {found.last}: {len(found.samples):,} samples, positions {found.start:,} to {found.stop - 1:,}, "
        f"epochs {found.start / found.num_sequences:.3f} to {found.stop / found.num_sequences:.3f}",
    ]
    lines += [f"problem: {problem}" for problem in found.problems]
    if not found.problems:
        once = "each set's samples in its own order" if config.data.mix else "each sample once an epoch"
        lines.append(f"{once}, none left out")
    lines.append(
        f"{len(found.documents):,} documents"
        + (", those with the most tokens:" if len(found.documents) > most else ":")
    )
    largest = sorted(found.documents.items(), key=lambda item: -item[1])[:most]
    lines += [f"{tokens:>12,} tokens of document {dataset.document_name(number)}" for number, tokens in sorted(largest)]
    return lines


def as_facts(found: Seen) -> dict[str, Any]:
    """For --json: samples by step, tokens by document."""
    by_step: dict[str, Sequence[int]] = {
        str(step): found.samples[found.of_step == step].tolist() for step in range(found.first, found.last + 1)
    }
    return {
        "steps": [found.first, found.last],
        "start": found.start,
        "samples_an_epoch": found.num_sequences,
        "samples": by_step,
        "tokens_of_documents": {str(k): v for k, v in found.documents.items()},
        "problems": list(found.problems),
    }
