"""Who keeps whom waiting: from the positions that the ranks report to one message, or to the finding that all is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainwright.position import STEP_CALLS, Position, of_ranks

_MOST_GROUPS = 6
GONE = "gone: the process runs no more"
# What Gloo, NCCL and the store say on a rank when another one has ended.
PEER_IS_GONE = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "pair closure",
    "Socket closed",
    "failed to recv",
    "Timed out",
    "timed out",
    "timeout",
    "ncclRemoteError",
    "ncclSystemError",
)
TORN = (*PEER_IS_GONE, "Received data size doesn't match", "preamble.length")
"""And what Gloo says when two collectives of different sizes meet."""


@dataclass(frozen=True)
class Report:
    """One rank's answer to a hearing."""

    position: Position
    waited_s: float
    """Since its last note."""
    frames: tuple[str, ...] = ()
    """Its training thread's stack, innermost last, as `file.py:12 in name: code`."""
    user_frame: str = ""
    """The innermost of the user's own frames."""
    answers: bool = True
    """False: it did not; the position is what its ledger says."""
    gone: bool = False
    """Its process runs no more."""
    blocked: bool = False
    """Its training thread waits: for a collective, or for the device."""

    @property
    def inside(self) -> bool:
        """In a call that other ranks take part in."""
        return bool(self.position.call) or self.position.phase == "backward"

    @property
    def place(self) -> tuple[str, int]:
        """Call and step; what belongs to one step is one place."""
        call = self.position.call
        return ("step" if not call or call in STEP_CALLS else call, self.position.step)


def judge(
    reports: Mapping[int, Report], size: int, *, limit_reached: bool, disagree_s: float, outside_s: float = 0.0
) -> tuple[str, str, str] | None:
    """(got, rule, remedy) of a job that cannot go on; None where waiting may still help.

    reports: by rank, at most `size`. limit_reached: a rank has waited as long as it may for what happens inside the
    engine; outside_s: how long it may wait for ranks that are outside, in code of the user's or reading data.
    """
    gone = sorted(rank for rank, report in reports.items() if report.gone)
    if gone:
        return _gone(reports, gone)
    # A rank that computes is no proof of anything, however long it takes; nor is one that has moved since.
    settled = all(r.inside and r.blocked and r.waited_s > disagree_s / 2 for r in reports.values())
    found = disagreement(reports) if settled and len(reports) == size else None
    if found is not None or not limit_reached:
        return found
    waiting_s = max((r.waited_s for r in reports.values() if r.inside and r.blocked), default=0.0)
    outside = any(not reports[rank].inside for rank in _behind(reports))
    if not waiting_s or (outside and len(reports) == size and waiting_s < outside_s):
        return None
    return _too_long(reports, size)


def disagreement(reports: Mapping[int, Report]) -> tuple[str, str, str] | None:
    """(got, rule, remedy) where ranks stand in places that cannot meet; None where they do not, or nobody knows."""
    inside = {rank: report for rank, report in reports.items() if report.inside}
    if len({report.place for report in inside.values()}) > 1:
        return _different_calls(inside)
    difference = (
        _parted(list(inside.values()))
        if len(inside) > 1 and not any(r.position.own_collectives for r in inside.values())
        else ""
    )
    return _different_collectives(inside, difference) if difference else None


def _gone(reports: Mapping[int, Report], gone: Sequence[int]) -> tuple[str, str, str]:
    lines = [f"{of_ranks(list(gone))} {'are' if len(gone) > 1 else 'is'} {GONE}"]
    return (
        "\n".join(lines + places_of(reports)),
        "a step lands on all ranks or on none",
        "see the logs of that rank; resume",
    )


def _different_calls(reports: Mapping[int, Report]) -> tuple[str, str, str]:
    ended = [rank for rank, report in reports.items() if report.position.call == "shutdown"]
    others = [rank for rank in reports if rank not in ended]
    if ended and others:
        position = reports[others[0]].position
        first = f"{of_ranks(ended)} ended after step {max(reports[r].position.step for r in ended) - 1}"
        got = f"{first}: no batch for step {position.step}, in which {of_ranks(others)} wait{'s' if len(others) == 1 else ''}"
        rule = "every rank runs the same number of steps"
        remedy = (
            "for batch in tw.even(loader): ... ends (or pads) all ranks together; or give every rank as many batches"
        )
        return "\n".join([got, *places_of(reports)]), rule, remedy
    by_call: dict[str, list[int]] = {}
    for rank, report in reports.items():
        by_call.setdefault(report.position.call or "backward", []).append(rank)
    special = {call: ranks for call, ranks in by_call.items() if call not in STEP_CALLS}
    call, ranks = min((special or by_call).items(), key=lambda item: len(item[1]))
    got = f"the ranks are in different calls: {of_ranks(ranks)} called {call}(), the others did not"
    if len(by_call) == 1:
        got = f"the ranks are in different steps of {call}()"
    remedy = (
        f"call {call}() on every rank, outside of any `if rank == 0`"
        if special
        else "the same number of micro-batches on every rank"
    )
    return "\n".join([got, *places_of(reports)]), f"{call}() is collective: all ranks call it at the same point", remedy


def _parted(reports: Sequence[Report]) -> str:
    """Where collectives that all ranks have called differ; empty where they do not."""
    least = min(r.position.collectives for r in reports)
    cut = []
    for report in reports:
        position = report.position
        beyond = position.collectives - least
        ring = (
            position.last_collectives[: len(position.last_collectives) - beyond]
            if beyond
            else position.last_collectives
        )
        cut.append(_with(position, least, ring))
    return first_difference(cut)


def first_difference(positions: list[Position]) -> str:
    """Where the last collectives of `positions` part, in words; empty where they do not, or do so out of sight."""
    positions = sorted(positions, key=lambda position: position.rank)
    start = max(p.collectives - len(p.last_collectives) for p in positions)
    for number in range(start, max(p.collectives for p in positions)):
        at = [_collective(p, number) for p in positions]
        if len(set(at)) > 1:
            groups: dict[str, list[int]] = {}
            for position, name in zip(positions, at, strict=True):
                groups.setdefault(name, []).append(position.rank)
            return "; ".join(f"{of_ranks(ranks)}: {name or 'nothing'}" for name, ranks in groups.items())
    return ""


def _collective(position: Position, number: int) -> str:
    """The name of the collective `number` (from 0) of this rank; empty where it has not come to it."""
    index = number - (position.collectives - len(position.last_collectives))
    return position.last_collectives[index] if 0 <= index < len(position.last_collectives) else ""


def _with(position: Position, collectives: int, ring: tuple[str, ...]) -> Position:
    return replace(position, collectives=collectives, last_collectives=ring)


def _different_collectives(reports: Mapping[int, Report], difference: str) -> tuple[str, str, str]:
    got = f"the ranks called different collectives: {difference}"
    rule = "collectives are matched by their order: every rank runs the same modules, in the same order, equally often"
    return "\n".join([got, *places_of(reports)]), rule, "no branch on the rank or on the data around a module"


def _too_long(reports: Mapping[int, Report], size: int) -> tuple[str, str, str]:
    silent = sorted(set(range(size)) - set(reports))
    missing = _behind(reports)
    longest = max(report.waited_s for report in reports.values())
    got = f"no progress for {longest:.0f} s"
    if silent:
        got += f"; {of_ranks(silent)} did not answer"
    elif len(missing) < len(reports):
        got += f": {of_ranks(missing)} did not arrive where the others wait"
    lines = [got, *places_of(reports)]
    stuck = reports[missing[0]]
    if stuck.frames and len(missing) < len(reports):
        lines.append(f"  rank {missing[0]} stands in")
        lines += [f"    {frame}" for frame in stuck.frames[-4:]]
    remedy = f"guard.wait=30m if rank {missing[0]} on {stuck.position.host} was only slow; py-spy dump --pid PID shows where a process is"
    return "\n".join(lines), "ranks make progress within guard.wait of each other", remedy


def _behind(reports: Mapping[int, Report]) -> list[int]:
    """The ranks that the others wait for: not in a call, or with the fewest collectives."""

    def progress(report: Report) -> tuple[int, int, int]:
        position = report.position
        return position.step, int(report.inside and report.answers), position.collectives

    least = min(progress(report) for report in reports.values())
    return sorted(rank for rank, report in reports.items() if progress(report) == least)


def places_of(reports: Mapping[int, Report], asked: bool = True) -> list[str]:
    """A line for each group of ranks in one place. asked: the ranks were, so that silence is worth a word."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rank, report in sorted(reports.items()):
        position = report.position
        after = f"; last collective {position.last_collective}" if position.last_collective and report.inside else ""
        state = " (does not answer)" if asked and not report.answers and not report.gone else ""
        groups.setdefault((position.describe() + state, after, report.user_frame), []).append(rank)
    lines = []
    for (where, after, frame), ranks in list(groups.items())[:_MOST_GROUPS]:
        waited = max(reports[rank].waited_s for rank in ranks)
        lines.append(
            f"  {of_ranks(ranks)}: {where}, for {waited:.1f} s{after}" + (f"\n    at {frame}" if frame else "")
        )
    if len(groups) > _MOST_GROUPS:
        lines.append(f"  and {len(groups) - _MOST_GROUPS} more places")
    return lines
