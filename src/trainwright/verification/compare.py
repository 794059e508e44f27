"""The comparisons, on rank 0: gradients, weights, copies, ties, and the samples that the ranks saw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.data.batch import IGNORE_INDEX, Batch
from trainwright.verification.collect import Piece, Placement, Seen
from trainwright.verification.reference import ReferenceStep
from trainwright.verification.report import Problem


@dataclass(frozen=True)
class Difference:
    """One tensor beside the reference's."""

    error: float
    cosine: float


def relative(found: float, expected: float) -> float:
    """|found - expected| / |expected|; inf where `found` is not finite."""
    if not math.isfinite(found):
        return math.inf
    return abs(found - expected) / max(abs(expected), 1e-30)


def difference(found: Tensor, expected: Tensor, floor: float) -> Difference:
    """‖found - expected‖ / max(‖expected‖, floor), and the cosine between them (1 where both are below the floor)."""
    a, b = found.double().flatten(), expected.double().flatten()
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return Difference(math.inf, 0.0)
    size_a, size_b = a.norm().item(), b.norm().item()
    error = (a - b).norm().item() / max(size_b, floor, 1e-300)
    if max(size_a, size_b) <= floor:
        return Difference(error, 1.0)
    return Difference(error, float(a @ b) / max(size_a * size_b, 1e-300))


def compare_gradients(
    found: Mapping[str, Tensor], step: ReferenceStep, ties: Mapping[str, str], floor_share: float
) -> tuple[dict[str, Difference], list[str]]:
    """(differences by the strategy's parameter name, names that one side lacks).

    ties: other name -> first name. floor_share: of the global norm, the least that an error is measured against.
    """
    expected = step.gradients
    floor = floor_share * step.norm
    known = {name: ties.get(name, name) for name in found}
    differences = {name: difference(found[name], expected[r], floor) for name, r in known.items() if r in expected}
    lacking = [name for name, r in known.items() if r not in expected]
    return differences, lacking + sorted(set(expected) - set(known.values()))


def compare_values(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], ties: Mapping[str, str]
) -> dict[str, float]:
    """‖p - p_ref‖ over the larger of ‖p_ref‖ and the norm of an average parameter of its size, by name.

    A bias that started at zero and has no gradient but rounding has no size of its own to be measured against.
    """
    total = math.sqrt(sum(float(t.double().square().sum()) for t in expected.values()))
    rms = total / math.sqrt(max(1, sum(t.numel() for t in expected.values())))
    errors = {}
    for name, tensor in found.items():
        reference = expected.get(ties.get(name, name))
        if reference is not None:
            errors[name] = difference(tensor, reference, rms * math.sqrt(max(1, tensor.numel()))).error
    return errors


def update_cosine(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor], ties: Mapping[str, str]
) -> float:
    """The cosine between both sides' changes of all weights since `start`; 1 where neither changed."""
    dot = mine = theirs = 0.0
    for name, tensor in found.items():
        if name in ties and ties[name] in found:
            continue  # a second copy
        key = ties.get(name, name)
        a, b = (t.double() - start[key].double() for t in (tensor, expected[key]))
        dot, mine, theirs = dot + float((a * b).sum()), mine + float(a.square().sum()), theirs + float(b.square().sum())
    return dot / math.sqrt(mine * theirs) if mine and theirs else float(mine == theirs)


def unequal_start(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    ties: Mapping[str, str],
    layout: Mapping[str, Placement],
) -> list[Problem]:
    """Initial weights that are not the reference's, to the bit."""
    problems = []
    for name, tensor in found.items():
        reference = expected.get(ties.get(name, name))
        if reference is None or not torch.equal(tensor, reference.to(tensor.dtype)):
            what = "has no counterpart in the unsharded model" if reference is None else "starts from other values"
            problems.append(Problem("weights", f"{name} {what}", 0, name, layout=layout[name].text))
    missing = sorted(set(expected) - {ties.get(name, name) for name in found})
    return problems + [Problem("weights", f"{name} is held by no rank", 0, name) for name in missing]


def unequal_copies(
    pieces: Sequence[Mapping[str, Piece]], what: str, step: int | None, layout: Mapping[str, Placement]
) -> list[Problem]:
    """Pieces that several ranks hold and that are not the same bits: the rank that differs from most, by name."""
    holders: dict[tuple[str, object], dict[int, bytes]] = {}
    for rank, held in enumerate(pieces):
        for name, piece in held.items():
            holders.setdefault((name, piece.box), {})[rank] = piece.digest
    problems = []
    for (name, _), digests in holders.items():
        counts = Counter(digests.values())
        if len(counts) > 1:
            common = counts.most_common(1)[0][0]
            odd = [rank for rank, digest in digests.items() if digest != common]
            alike = [rank for rank in digests if rank not in odd]
            text = (
                f"{what} of {name}: rank {_list(odd)} and rank {_list(alike)} hold copies of the same rows that differ"
            )
            problems.append(Problem("replicas", text, step, name, odd[0], layout=layout[name].text))
    return problems


def untied(
    weights: Mapping[str, Tensor],
    ties: Mapping[str, str],
    apart: Sequence[str],
    step: int,
    layout: Mapping[str, Placement],
) -> list[Problem]:
    """Tied weights that are two parameters on one rank, or whose copies (pipeline) are not the same bits."""
    problems = []
    for alias, name in ties.items():
        copies_differ = alias in weights and name in weights and not torch.equal(weights[alias], weights[name])
        if alias in apart or copies_differ:
            how = "are two parameters" if alias in apart else "have drifted apart"
            where = layout[alias].text if alias in layout else None
            problems.append(
                Problem("tied", f"{alias} and {name} are tied in the model, and {how}", step, alias, layout=where)
            )
    return problems


@dataclass(frozen=True)
class Place:
    """What a rank is meant to see."""

    replica: int
    context: int
    twins: tuple[int, int]
    """(pipeline, tensor): ranks that differ here alone see the same tokens."""


def check_data(
    seen: Sequence[Seen], whole: Batch, places: Sequence[Place], row_range: Callable[[int], tuple[int, int]], step: int
) -> list[Problem]:
    """Whether the ranks together saw exactly the global batch, each its own rows, nothing twice."""
    owner: dict[int, int] = {}
    by_sample = {int(s): row for row, s in enumerate(whole.sample_ids)}
    for place in places:
        start, stop = row_range(place.replica)
        owner |= {int(s): place.replica for s in whole.sample_ids[start:stop]}
    rows: dict[int, dict[int, list[tuple[int, int]]]] = {rank: {} for rank in range(len(places))}
    problems: list[Problem] = []
    for one in {(s.rank, s.index): s for s in seen}.values():
        for sample, tokens, labels in zip(one.sample_ids.tolist(), one.input_ids, one.labels, strict=True):
            pairs = list(zip(tokens.tolist(), labels.tolist(), strict=True))
            if sample < 0:
                if any(label != IGNORE_INDEX for _, label in pairs):
                    problems.append(Problem("data", f"rank {one.rank} trains on a padded row", step, rank=one.rank))
            elif sample in rows[one.rank]:
                text = f"rank {one.rank} saw sample {sample} twice in a step"
                problems.append(Problem("data", text, step, rank=one.rank))
            else:
                rows[one.rank][sample] = pairs
    for rank, place in enumerate(places):
        mine = {sample for sample, replica in owner.items() if replica == place.replica}
        for sample in sorted(set(rows[rank]) - mine):
            whose = f"replica {owner[sample]}'s" if sample in owner else "of another step"
            problems.append(Problem("data", f"rank {rank} saw sample {sample}, {whose}", step, rank=rank))
        missed = sorted(mine - set(rows[rank]))
        problems += [Problem("data", f"rank {rank} did not see its sample {s}", step, rank=rank) for s in missed]
    return problems + _other_tokens(rows, whole, by_sample, places, step)


def _other_tokens(
    rows: Mapping[int, Mapping[int, list[tuple[int, int]]]],
    whole: Batch,
    by_sample: Mapping[int, int],
    places: Sequence[Place],
    step: int,
) -> list[Problem]:
    """Rows whose tokens are not those of their sample. Context ranks hold parts of a row, in any order, padded or not."""
    problems = []
    for rank, place in enumerate(places):
        if place.context:
            continue  # the first of its context ranks speaks for all
        others = [r for r, p in enumerate(places) if (p.replica, p.twins) == (place.replica, place.twins)]
        for sample in rows[rank]:
            if sample not in by_sample:
                continue
            row = by_sample[sample]
            expected = Counter(zip(whole.input_ids[row].tolist(), whole.labels[row].tolist(), strict=True))
            if all(Counter(rows[r].get(sample, [])) == expected for r in others):
                continue
            found = Counter(pair for r in others for pair in rows[r].get(sample, []))
            extra = found - expected
            if expected - found or any(label != IGNORE_INDEX for _, label in extra):
                text = f"rank {_list(others)} trained on other tokens than those of sample {sample}"
                twin = next((s for s, k in by_sample.items() if s != sample and _same(found, whole, k)), None)
                text += f": they are sample {twin}'s" if twin is not None else ""
                problems.append(Problem("data", text, step, rank=rank))
    return problems


def _same(found: Counter[tuple[int, int]], whole: Batch, row: int) -> bool:
    return found == Counter(zip(whole.input_ids[row].tolist(), whole.labels[row].tolist(), strict=True))


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
