"""Training over a slow link: two hosts as network namespaces, joined by a veth pair that `tc` holds to 20 Mbit/s each way.

    python benchmarks/slow_link.py --data data/plays [--steps 400] [--every 5 10] [--rate 20mbit] [--out runs/slow-link]

The same model, data, seed and global batch three times: synchronous data parallelism over the link (a few steps, timed),
synchronous on one host (no link; what the quality is compared with), and two groups with an overlapped outer step over the
link. Prints tokens/s and held-out bits per byte at equal tokens, and draws both. Linux; needs `unshare -rn`, `ip` and `tc`.
`--only killed`: two groups, and every process of the second host dies by SIGKILL halfway and is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples" / "quickstart.yaml"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICES = ("tw-host-a", "tw-host-b")
INSIDE = "TRAINWRIGHT_SLOW_LINK"
PORT = 29510


@dataclass(frozen=True)
class Run:
    """A finished run, of all its hosts."""

    name: str
    steps: int
    tokens_per_s: float
    bits_per_byte: float | None
    bytes_per_step: float
    """Over the link, each way."""
    curve: list[tuple[int, float]]
    """(tokens, held-out bits per byte)."""
    training_time_s: float


class Hosts:
    """This namespace is the first host, a second one hangs on the other end of the wire."""

    def __init__(self, rate: str) -> None:
        _do("ip", "link", "set", "lo", "up")
        self._second = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        time.sleep(0.5)
        _do("ip", "link", "add", "name", DEVICES[0], "type", "veth", "peer", "name", DEVICES[1])
        _do("ip", "link", "set", DEVICES[1], "netns", str(self._second.pid))
        for host in (0, 1):
            self.do(host, "ip", "link", "set", "lo", "up")
            self.do(host, "ip", "address", "add", f"{ADDRESSES[host]}/24", "dev", DEVICES[host])
            self.do(host, "ip", "link", "set", DEVICES[host], "up")
            shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
            self.do(host, "tc", "qdisc", "add", "dev", DEVICES[host], *shape)

    def on(self, host: int, *command: str) -> list[str]:
        """`command` as it runs on a host."""
        return [*command] if host == 0 else ["nsenter", "-t", str(self._second.pid), "-n", *command]

    def do(self, host: int, *command: str) -> None:
        _do(*self.on(host, *command))

    def sent_bytes(self) -> int:
        """By the first host, so far."""
        line = next(t for t in Path("/proc/net/dev").read_text().splitlines() if t.strip().startswith(DEVICES[0]))
        return int(line.split(":")[1].split()[8])

    def close(self) -> None:
        self._second.kill()
        self._second.wait()


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="token data set")
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--synchronous-steps", type=int, default=12, help="over the link, where a step takes seconds")
    parser.add_argument("--rate", default="20mbit", help="of the link, as tc writes it")
    parser.add_argument("--out", type=Path, default=Path("runs/slow-link"))
    parser.add_argument("--every", type=int, nargs="+", default=[5], help="H; several are compared")
    parser.add_argument("--dtype", default="int4", help="of what the groups send: fp32, bf16, int8 or int4")
    parser.add_argument("--outer-lr", type=float, default=1.0)
    parser.add_argument("--outer-momentum", type=float, default=0.0)
    parser.add_argument(
        "--only", choices=("link", "host", "groups", "killed"), nargs="+", default=("link", "host", "groups")
    )
    parser.add_argument("overrides", nargs="*", help="key.path=value, for every run")
    given = parser.parse_intermixed_args()
    if INSIDE not in os.environ:
        for tool in ("unshare", "nsenter", "ip", "tc"):
            if shutil.which(tool) is None:
                sys.exit(f"{tool} is not here: two hosts on one machine are Linux network namespaces")
        # Addresses have no names here, of which torch would warn at each connection.
        inside = os.environ | {INSIDE: "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        return subprocess.run(["unshare", "-rn", sys.executable, *sys.argv], env=inside).returncode
    hosts = Hosts(given.rate)
    try:
        runs = []
        if "link" in given.only:
            runs.append(_synchronous(hosts, given))
        if "host" in given.only:
            runs.append(_one_host(hosts, given))
        if "groups" in given.only:
            runs += [_groups(hosts, given, every) for every in given.every]
        if "killed" in given.only:
            from slow_link_killed import killed

            return killed(hosts, given, given.every[0])
    finally:
        hosts.close()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = _with_earlier(runs, given.out / "slow-link.json")
    show(runs, given.rate)
    print(f"drawn: {draw(runs, given.out)}")
    return 0


# --- the three runs -----------------------------------------------------------------------------------------------


def _command(given: argparse.Namespace, steps: int, run_dir: Path, *more: str) -> list[str]:
    settings = [
        f"data.path={given.data}",
        "duration=null",
        f"steps={steps}",
        f"run_dir={run_dir}",
        "checkpoint.at_end=false",
    ]
    settings += ["guard.watch=false", "checkpoint.resume=never"]
    return [
        sys.executable,
        "-m",
        "trainwright.cli",
        "train",
        str(given.config),
        *settings,
        *given.overrides,
        *more,
    ]


def _synchronous(hosts: Hosts, given: argparse.Namespace) -> Run:
    """One world over the link, one rank a host."""
    folder = fresh(given.out / "synchronous-link")
    steps = given.synchronous_steps
    print(f"\nsynchronous over the link, {steps} steps: every step waits for {given.rate}", flush=True)
    before = hosts.sent_bytes()
    command = _command(given, steps, folder, "evaluate.every=0", "evaluate.final_batches=1", "lr_schedule={}")
    _train([hosts.on(h, *command) for h in (0, 1)], [_one_world(h, ADDRESSES[0]) | interface(h) for h in (0, 1)])
    sent = (hosts.sent_bytes() - before) / steps
    return _of("synchronous, over the link", [folder], sent, first=2, quality=False)


def _one_host(hosts: Hosts, given: argparse.Namespace) -> Run:
    """The same world on one host: its quality is what the groups are compared with."""
    folder = fresh(given.out / "synchronous-host")
    print(f"\nsynchronous on one host, {given.steps} steps: the quality to compare with", flush=True)
    command = _command(given, given.steps, folder)
    _train([hosts.on(0, *command)] * 2, [_one_world(h, "127.0.0.1") | {"GLOO_SOCKET_IFNAME": "lo"} for h in (0, 1)])
    return _of("synchronous, one host", [folder], 0.0)


def _groups(hosts: Hosts, given: argparse.Namespace, every: int) -> Run:
    """A group a host."""
    folder = fresh(given.out / f"groups-{every}")
    print(f"\ntwo groups over the link, {given.steps} steps, averaged every {every} in {given.dtype}", flush=True)
    before = hosts.sent_bytes()
    with lighthouse():
        _train([group_command(hosts, given, every, folder, h) for h in (0, 1)], [interface(h) for h in (0, 1)])
    sent = (hosts.sent_bytes() - before) / given.steps
    step = f"outer lr {given.outer_lr:g}" + (f", momentum {given.outer_momentum:g}" if given.outer_momentum else "")
    return _of(f"2 groups, H={every}, {given.dtype}, {step}", [folder / f"group-{h}" for h in (0, 1)], sent)


@contextlib.contextmanager
def lighthouse() -> Iterator[None]:
    """On the first host."""
    command = [sys.executable, "-m", "trainwright.cli", "lighthouse", "--bind", f"{ADDRESSES[0]}:{PORT}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def group_command(
    hosts: Hosts, given: argparse.Namespace, every: int, folder: Path, host: int, *more: str
) -> list[str]:
    outer = f"outer.groups=2 outer.every={every} outer.lighthouse={ADDRESSES[0]}:{PORT}".split()
    outer += [f"outer.dtype={given.dtype}", f"outer.lr={given.outer_lr}", f"outer.momentum={given.outer_momentum}"]
    quiet = ["--quiet"] if host else []  # one host's progress is enough
    return hosts.on(host, *_command(given, given.steps, folder, *outer, f"outer.group={host}", *more, *quiet))


def _one_world(rank: int, address: str) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address, "MASTER_PORT": "29400",
    }  # fmt: skip


def interface(host: int) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": DEVICES[host]}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _train(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    """Runs both hosts' commands at once, one core each."""
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(c, env=own | e) for c, e in zip(commands, environments, strict=True)]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a host's training ended with {codes}")


def _of(name: str, folders: list[Path], sent: float, first: int = 0, quality: bool = True) -> Run:
    """What the folders' records say. first: steps left out of the speed, where a few are timed one by one."""
    from trainwright.monitor.metrics import read_metrics, read_summary

    metrics = [read_metrics(folder) for folder in folders]
    steps = len(metrics[0].steps)
    tokens_a_step = sum(m.steps[-1]["tokens"] for m in metrics) / steps
    times = [float(read_summary(folder)["training_time_s"]) for folder in folders]
    seconds = max(times)
    if first:
        seconds = sum(line["step_time_s"] for line in metrics[0].steps[first:]) / (steps - first) * steps
    curve = [(int(e["step"] * tokens_a_step), e["val_bits_per_byte"]) for e in metrics[0].evaluations]
    bits = metrics[0].evaluations[-1]["val_bits_per_byte"] if quality else None
    return Run(name, steps, tokens_a_step * steps / seconds, bits, sent, curve if quality else [], seconds)


def _with_earlier(runs: list[Run], path: Path) -> list[Run]:
    """These runs and those that an earlier call with the same --out made (--only, other --every)."""
    earlier = [Run(**values) for values in json.loads(path.read_text())] if path.is_file() else []
    names = {run.name for run in runs}
    found = sorted([*runs, *(run for run in earlier if run.name not in names)], key=lambda run: run.name, reverse=True)
    path.write_text(json.dumps([asdict(run) for run in found], indent=1))
    return found


# --- what is said of them ------------------------------------------------------------------------------------------


def show(runs: list[Run], rate: str) -> None:
    """A table, and the two ratios."""
    print(f"\n{'two hosts, ' + rate:46}{'steps':>7}{'tokens/s':>11}{'MB a step':>11}{'held-out bits/byte':>20}")
    for run in runs:
        bits = "" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}"
        print(f"{run.name:46}{run.steps:>7}{run.tokens_per_s:>11,.0f}{run.bytes_per_step / 1e6:>11.2f}{bits:>20}")
    by_name = {run.name: run for run in runs}
    link, host = by_name.get("synchronous, over the link"), by_name.get("synchronous, one host")
    for run in runs:
        if not run.name.startswith("2 groups"):
            continue
        speed = "" if link is None else f"{run.tokens_per_s / link.tokens_per_s:.1f}x the tokens/s over the link; "
        quality = ""
        if host is not None and run.bits_per_byte is not None and host.bits_per_byte is not None:
            quality = f"{run.bits_per_byte / host.bits_per_byte - 1:+.2%} bits/byte against one host at equal tokens"
        print(f"{run.name}: {speed}{quality}")


def draw(runs: list[Run], folder: Path) -> Path:
    """The comparison as a page: speed beside quality."""
    import plotly.graph_objects as graph
    from plotly.subplots import make_subplots

    page = make_subplots(1, 2, subplot_titles=("tokens/s, both hosts together", "held-out bits/byte by tokens"))
    timed = [run for run in runs if run.name != "synchronous, one host"]
    bars: dict[str, Any] = {"text": [f"{run.tokens_per_s:,.0f}" for run in timed], "textposition": "outside"}
    page.add_trace(
        graph.Bar(x=[r.name for r in timed], y=[r.tokens_per_s for r in timed], showlegend=False, **bars), 1, 1
    )
    for run in runs:
        if run.curve:
            x, y = zip(*run.curve, strict=True)
            page.add_trace(graph.Scatter(x=x, y=y, mode="lines+markers", name=run.name), 1, 2)
    page.update_layout(title="Training over a slow link", template="plotly_white", width=1100, height=480)
    path = folder / "slow-link.html"
    page.write_html(path, include_plotlyjs=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
