"""Measures this machine's processors in some twenty seconds, and keeps the figures: `python -m trainwright.planner.calibrate`.

As many processes as a job has ranks here measure at once, since they share cores, caches and memory: what one of two ranks
reaches is not what it would reach alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from trainwright import distributed, exchange
from trainwright.errors import LaunchError
from trainwright.fused.linear import widens
from trainwright.launch.run import launch_local, threads_per_rank, usable_cores
from trainwright.launcher_variables import without_launcher
from trainwright.models.attention import attend
from trainwright.monitor.machine import cpu_name, version_of
from trainwright.planner.processor import Curve, Rates
from trainwright.planner.timing import TINY, crowded, reference, seconds_of, trained
from trainwright.storage import atomic_write_json

_SIDES = (32, 128, 512, 2048, 8192)
_MOST_FLOPS = 1.2e9
"""Of a product that is measured: 10 to 40 ms on one core."""
_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 26, 1 << 28)
_LENGTHS = (64, 256, 1024)
_MESSAGES = (1 << 8, 1 << 14, 1 << 18, 1 << 21, 1 << 25)
_SWEEPS = 2
"""Over all that is measured, some seconds apart; one where ranks share cores, where all takes its turns."""


def rates_here(ranks: int, dtypes: tuple[str, ...], again: bool = False) -> Rates:
    """What `ranks` ranks on this machine reach: from an earlier measurement, or a new one of 15 to 30 seconds.

    dtypes: formats to know, such as ("float32", "bfloat16"). Raises LaunchError where measuring fails.
    """
    path = _cache(ranks)
    known = None if again else _read(path)
    missing = [d for d in dtypes if known is None or d not in known.products]
    if known is not None and not missing:
        return known
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rates.json")
        # A process of its own: it starts ranks, with variables of their own.
        environment = without_launcher(os.environ)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads_per_rank(ranks))
        command = [sys.executable, "-m", __name__, str(ranks), str(out), *dict.fromkeys(["float32", *dtypes])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        measured = _read(out)
        if done.returncode or measured is None:
            raise LaunchError(
                f"measuring this machine with {ranks} rank(s) failed: {(done.stderr or done.stdout).strip()[-2000:]}",
                "a strategy is chosen by what the machine was measured to do",
                "strategy=manual, with zero.stage and batch.micro_size of your choice",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, measured.to_json())
    return measured


def known_rates(ranks: int, dtypes: tuple[str, ...]) -> Rates | None:
    """Those of an earlier measurement; None where there is none. Measures nothing."""
    known = _read(_cache(ranks))
    return known if known is not None and all(d in known.products for d in dtypes) else None


def _read(path: Path) -> Rates | None:
    try:
        return Rates.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _cache(ranks: int) -> Path:
    """A file for each kind of processor, number of ranks and threads, and torch."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_per_rank(ranks))
    facts = (cpu_name(), str(usable_cores()), str(ranks), threads, str(version_of("torch")), "4")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "trainwright" / f"rates-{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:16]}.json"


# --- on the ranks ----------------------------------------------------------------------------------------------------


def measure(argv: list[str]) -> int:
    """A rank's part: [file to write, formats...]. Collective."""
    path, *dtypes = argv
    distributed.start("gloo")
    ranks = dist.get_world_size()
    formats = {name: getattr(torch, name) for name in dtypes}
    tiny = trained(TINY, micro_size=2, length=16)
    whole = [reference()]
    best = _sweep(formats)
    for _ in range(0 if crowded() else _SWEEPS - 1):
        whole.append(reference())
        best = _least(best, _sweep(formats))
    whole.append(reference())
    rates = Rates(cpu_name(), ranks, torch.get_num_threads(), **best, process_bytes=tiny.grown_bytes)
    rates = replace(rates, operator_s=max(0.0, tiny.best_s - tiny.told_s(rates)) / tiny.operators)
    usual_s = statistics.median(seconds for steps in whole for seconds in steps.seconds)
    rates = replace(rates, stretch=max(1.0, usual_s / whole[0].told_s(rates)), reference_s=usual_s)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(rates.to_json()))
    distributed.shutdown()
    return 0


def _sweep(formats: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Each kind of work once: the tables of `Rates`."""
    with torch.no_grad():
        # What goes through fp32 on this processor is counted as that (fused/linear.py).
        narrow = [name for name, dtype in formats.items() if widens(torch.empty(0, dtype=dtype))]
        products = {name: {} if name in narrow else dict(_products(dtype)) for name, dtype in formats.items()}
        moved = {name: _moved(dtype) for name, dtype in formats.items()}
        several = dist.get_world_size() > 1
        collectives = {kind: _curve(_MESSAGES, make) for kind, make in _COLLECTIVES.items()} if several else {}
    attention = {name: _attention(dtype) for name, dtype in formats.items()}
    return {"products": products, "moved": moved, "attention": attention, "collectives": collectives}


def _least(one: Any, other: Any) -> Any:
    """Of two sweeps the shorter times: a machine is slower for seconds at a time when something else is done by it."""
    if isinstance(one, dict):
        return {key: _least(one[key], other[key]) for key in one}
    if isinstance(one, tuple):
        return tuple((size, min(seconds, again)) for (size, seconds), (_, again) in zip(one, other, strict=True))
    return min(one, other)


def _curve(sizes: tuple[int, ...], make: Callable[[int], Callable[[], Any]]) -> Curve:
    return tuple((float(size), seconds_of(make(size))) for size in sizes)


def _products(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    for m in _SIDES[:-1]:
        for n in _SIDES:
            for k in _SIDES:
                if 2.0 * m * n * k <= _MOST_FLOPS and max(m, n, k) / min(m, n, k) <= 256:
                    left, right = torch.full((m, k), 0.5, dtype=dtype), torch.full((n, k), 0.25, dtype=dtype)
                    yield f"{m}x{n}x{k}", seconds_of(functools.partial(torch.mm, left, right.t()))


def _moved(dtype: torch.dtype) -> dict[str, Curve]:
    """Three tensors an addition, two an activation: bytes are all that is read and written."""

    def add(size: int) -> Callable[[], Any]:
        x = torch.full((size // 3 // dtype.itemsize + 1,), 0.5, dtype=dtype)
        return lambda: x + x

    def activation(size: int) -> Callable[[], Any]:
        x = torch.linspace(-4, 4, size // 2 // dtype.itemsize + 1).to(dtype)
        return lambda: F.silu(x)

    def softmax(size: int) -> Callable[[], Any]:
        columns = min(4096, size // 2 // dtype.itemsize)
        x = torch.linspace(-4, 4, columns).to(dtype).expand(size // 2 // dtype.itemsize // columns, columns)
        x = x.contiguous()
        return lambda: torch.log_softmax(x, -1)

    def lookup(size: int) -> Callable[[], Any]:
        rows = max(1, size // 2 // dtype.itemsize // 256)
        table, where = torch.zeros(4096, 256, dtype=dtype), torch.arange(rows) * 7 % 4096
        return lambda: F.embedding(where, table)

    def update(size: int) -> Callable[[], Any]:
        weight = torch.nn.Parameter(torch.full((size // 4 // 4 + 1,), 0.5))  # it, its gradient, two moments
        weight.grad = torch.full_like(weight, 0.5)
        return torch.optim.AdamW([weight], lr=1e-9, fused=True).step

    makes = {"elementwise": add, "activation": activation, "softmax": softmax, "lookup": lookup, "update": update}
    return {kind: _curve(_BYTES[:-1] if kind != "elementwise" else _BYTES, make) for kind, make in makes.items()}


def _attention(dtype: torch.dtype) -> dict[str, Curve]:
    """Seconds a FLOP, all pairs counted, causal."""
    both = [_attention_of(length, dtype) for length in _LENGTHS]
    return {
        "attention": tuple((float(length), one) for length, (one, _) in zip(_LENGTHS, both, strict=True)),
        "attention backward": tuple((float(length), back) for length, (_, back) in zip(_LENGTHS, both, strict=True)),
    }


def _attention_of(length: int, dtype: torch.dtype) -> tuple[float, float]:
    rows = max(1, 8 * 256 * 256 // length**2)
    q, k, v = (torch.full((rows, 4, length, 64), 0.5, dtype=dtype, requires_grad=True) for _ in range(3))
    flops = 4.0 * rows * 4 * length**2 * 64
    causal = functools.partial(attend, q, k, v, None)
    out = causal()
    gradient = torch.full_like(out, 0.5)
    back = seconds_of(functools.partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True))
    return seconds_of(causal) / flops, back / (2.5 * flops)


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _gather(size: int) -> Callable[[], Any]:
    out = torch.zeros(max(1, size // 4 // dist.get_world_size()) * dist.get_world_size())
    part = out[: out.numel() // dist.get_world_size()].clone()
    return lambda: exchange.all_gather(out, part, _group())


def _scatter(size: int) -> Callable[[], Any]:
    whole = torch.zeros(max(1, size // 4 // dist.get_world_size()) * dist.get_world_size())
    part = whole[: whole.numel() // dist.get_world_size()].clone()
    return lambda: exchange.reduce_scatter(part, whole, _group(), dist.ReduceOp.SUM)


def _reduce(size: int) -> Callable[[], Any]:
    whole = torch.zeros(max(1, size // 4))
    return lambda: exchange.all_reduce(whole, _group())


def _exchange(size: int) -> Callable[[], Any]:
    ranks = dist.get_world_size()
    whole = torch.zeros(max(1, size // 4 // ranks) * ranks)
    other = whole.clone()
    return lambda: dist.all_to_all_single(other, whole)


_COLLECTIVES: dict[str, Callable[[int], Callable[[], Any]]] = {
    "all-gather": _gather,
    "reduce-scatter": _scatter,
    "all-reduce": _reduce,
    "all-to-all": _exchange,
}


def main() -> int:
    """[ranks, file to write, formats...]."""
    ranks, path, *dtypes = sys.argv[1:]
    with tempfile.TemporaryDirectory() as logs:
        return launch_local([path, *dtypes], int(ranks), logs, entry="trainwright.planner.calibrate:measure")


if __name__ == "__main__":
    sys.exit(main())
