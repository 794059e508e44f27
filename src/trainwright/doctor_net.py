"""`trainwright doctor --net`: latency and bandwidth between ranks, pair by pair, collectives, and the clocks.

Runs on the ranks that a launcher has started (`torchrun ... -m trainwright.cli doctor --net`, srun, mpirun), or on --nproc
ranks of this machine. Everything has a short timeout: what does not answer is named, instead of waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainwright import distributed
from trainwright.errors import LaunchError
from trainwright.findings import Finding
from trainwright.guard.same_machines import check_same_software
from trainwright.ledger import here
from trainwright.monitor import words
from trainwright.scheduling import behind_computation

_TIMEOUT_S = 20
_PINGS, _BYTES = 20, 16 * 2**20
_ALL_PAIRS_UP_TO = 16
_SLOW = 0.3
"""A pair with less than this share of the median bandwidth is named."""


@dataclass(frozen=True)
class Pair:
    """Two ranks: round trip halved, and one-way bandwidth of a large message."""

    a: int
    b: int
    latency_s: float
    bytes_per_s: float
    clock_skew_s: float
    """How far b's clock is ahead of a's."""


def examine_net() -> list[Finding]:
    """Findings, on rank 0 (others get an empty list). Collective. Raises LaunchError where no group can be started."""
    world = distributed.start()
    size = dist.get_world_size()
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, distributed.host())
    if size == 1:
        return [
            Finding(
                "Ranks", "warn", "one rank: nobody to talk to", "trainwright doctor --net --nproc 2, or under torchrun"
            )
        ]
    findings = [Finding("Ranks", "ok", f"{size} on {len(set(hosts))} host(s): {', '.join(sorted(set(hosts)))}")]
    findings.append(_versions())
    devices = {"Gloo": torch.device("cpu")} | ({"NCCL": world.device} if world.device.type == "cuda" else {})
    for name, device in devices.items():
        with behind_computation(name == "Gloo"):  # as a run's
            group = dist.new_group(backend=name.lower(), timeout=timedelta(seconds=_TIMEOUT_S))
        with here.call("doctor --net", 0):
            findings += _of_backend(name, device, group, hosts)
    return findings if dist.get_rank() == 0 else []


def _of_backend(name: str, device: torch.device, group: Any, hosts: list[str]) -> list[Finding]:
    try:
        pairs = list(_pairs(device, group))
        collectives = _collectives(device, group)
    except RuntimeError as error:
        at = here.position().last_collective
        remedy = (
            "open the ports between the hosts, or name the interface: GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME=eth0"
        )
        return [Finding(name, "fail", f"{at} failed: {str(error).splitlines()[0][:160]}", remedy)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pairs)
    return _judge(name, [pair for part in everyone for pair in part], collectives, hosts)


def which_pairs(size: int) -> list[tuple[int, int]]:
    """All pairs of a few ranks; of many each rank's neighbour and its opposite."""
    if size <= _ALL_PAIRS_UP_TO:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    found = {tuple(sorted((a, (a + step) % size))) for a in range(size) for step in (1, size // 2)}
    return sorted((a, b) for a, b in found)


def _pairs(device: torch.device, group: Any) -> Iterator[Pair]:
    """This rank's measurements: of the pairs in which it is the first. One pair at a time."""
    rank = dist.get_rank()
    for a, b in which_pairs(dist.get_world_size()):
        here.collective(f"rank {a} - rank {b}".encode())
        dist.barrier(group)
        if rank == a:
            yield _ping(b, device, group, a)
        elif rank == b:
            _pong(a, device, group)
    dist.barrier(group)


def _ping(other: int, device: torch.device, group: Any, rank: int) -> Pair:
    small, large = torch.zeros(1, dtype=torch.float64, device=device), torch.zeros(_BYTES // 4, device=device)
    trips, skews = [], []
    for _ in range(_PINGS):
        start, wall = time.perf_counter(), time.time()
        dist.send(small, other, group)
        dist.recv(small, other, group)
        theirs = float(small.item())  # also waits for the device
        trips.append(time.perf_counter() - start)
        skews.append(theirs - (wall + time.time()) / 2)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        dist.send(large, other, group)
        dist.recv(small, other, group)
        small.item()
        took.append(time.perf_counter() - start)
    return Pair(rank, other, statistics.median(trips) / 2, _BYTES / min(took), skews[trips.index(min(trips))])


def _pong(other: int, device: torch.device, group: Any) -> None:
    small, large = torch.zeros(1, dtype=torch.float64, device=device), torch.zeros(_BYTES // 4, device=device)
    for _ in range(_PINGS):
        dist.recv(small, other, group)
        dist.send(small.fill_(time.time()), other, group)
    for _ in range(3):
        dist.recv(large, other, group)
        dist.send(small, other, group)


def _collectives(device: torch.device, group: Any) -> dict[str, float]:
    """Name -> bytes of the whole tensor a second."""
    size = dist.get_world_size()
    whole = torch.ones(_BYTES // 4 // size * size, device=device)
    part = torch.ones(whole.numel() // size, device=device)
    parts = list(whole.chunk(size))
    cases: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "all-gather": lambda: dist.all_gather(parts, part, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter(part, list(whole.chunk(size)), group=group),
        "all-to-all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, 0, group=group),
    }
    found = {}
    for name, run in cases.items():
        here.collective(name.encode())
        times = []
        for _ in range(3):
            dist.barrier(group)
            start = time.perf_counter()
            run()
            part[:1].tolist()
            times.append(time.perf_counter() - start)
        found[name] = whole.nbytes / min(times)
    expected = float(size)
    check = torch.ones(4, device=device)
    dist.all_reduce(check, group=group)
    if check.tolist() != [expected] * 4:
        raise RuntimeError(f"an all-reduce of ones gave {check.tolist()} on {size} ranks")
    return found


def _judge(name: str, pairs: list[Pair], collectives: dict[str, float], hosts: list[str]) -> list[Finding]:
    inside = [p for p in pairs if hosts[p.a] == hosts[p.b]]
    between = [p for p in pairs if hosts[p.a] != hosts[p.b]]
    if inside and between:  # each kind has its own measure: a link between machines is no slow one of a machine's
        findings = [_judge_pairs(f"{name} pairs of one machine", inside, hosts)]
        findings.append(_judge_pairs(f"{name} pairs between machines", between, hosts))
    else:
        findings = [_judge_pairs(f"{name} pairs", pairs, hosts)]
    speeds = ", ".join(f"{what} {words.byte_size(speed)}/s" for what, speed in collectives.items())
    findings.append(Finding(f"{name} collectives", "ok", f"{speeds} of {words.byte_size(_BYTES)}"))
    skew = max(pairs, key=lambda p: abs(p.clock_skew_s))
    bad = abs(skew.clock_skew_s) > 1.0
    text = f"at most {abs(skew.clock_skew_s) * 1e3:.1f} ms apart" + (f" ({skew.a} and {skew.b})" if bad else "")
    remedy = "start NTP or chrony: logs and checkpoints tell times" if bad else ""
    findings.append(Finding(f"{name} clocks", "warn" if bad else "ok", text, remedy))
    return findings


def _judge_pairs(name: str, pairs: list[Pair], hosts: list[str]) -> Finding:
    latency = statistics.median(p.latency_s for p in pairs)
    usual = statistics.median(p.bytes_per_s for p in pairs)

    def said(pair: Pair) -> str:
        return f"{pair.a} ({hosts[pair.a]}) - {pair.b} ({hosts[pair.b]}): {words.byte_size(pair.bytes_per_s)}/s"

    text = f"{len(pairs)} measured: {latency * 1e6:,.0f} us, {words.byte_size(usual)}/s in the middle"
    slow = [p for p in pairs if p.bytes_per_s < _SLOW * usual]
    if not slow:
        return Finding(name, "ok", f"{text}; slowest {said(min(pairs, key=lambda p: p.bytes_per_s))}")
    told = "; ".join(said(p) for p in slow[:4])
    return Finding(name, "warn", f"{text}; slow: {told}", "look at that host's link, or leave it out")


def _versions() -> Finding:
    """Whether all ranks run the same software. Collective."""
    try:
        check_same_software()
    except LaunchError as error:
        return Finding("Versions", "fail", error.got, error.remedy)
    return Finding("Versions", "ok", "Python, torch and Trainwright are the same on all ranks")
