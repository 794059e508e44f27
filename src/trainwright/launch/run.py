"""`trainwright train --nproc N`: N ranks on this machine, under torchrun's elastic agent used as a library.

The agent starts and watches the ranks; ours are: where their output goes, threads a rank, the first failure said once,
and a stop that lets the ranks save. Ctrl-C, SIGTERM and SIGHUP are forwarded to the ranks as SIGTERM and the agent goes
on waiting for them; a second Ctrl-C kills them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ledger, ledger_folder
from ..errors import LaunchError
from . import worker
from .failure import describe_failure, may_pass, oom_kills

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

DEFAULT_ENTRY = "trainwright.cli:main"
_SIGNALS_LEFT_TO_AGENT = "SIGQUIT"


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the container's CPU quota when that is lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def default_nproc() -> int:
    """Ranks when `--nproc` is left out: one a GPU, or one process on CPUs."""
    import torch

    return max(1, torch.cuda.device_count())


def threads_per_rank(nproc: int) -> int:
    """OMP_NUM_THREADS of a rank when it is not set: the cores shared out."""
    return max(1, usable_cores() // nproc)


def launch_local(
    argv: list[str], nproc: int | None, log_dir: str | Path, *, entry: str = DEFAULT_ENTRY, max_restarts: int = 0
) -> int:
    """Runs `entry(argv)` on `nproc` ranks of this machine; returns the exit code.

    argv: as after `trainwright`, such as ["train", "run.yaml"]. log_dir: rank N > 0 writes to `log_dir/rank-N.log`,
    rank 0 to this console. entry: `module:function` that takes the argument list. One rank runs in this process.
    nproc: None takes a rank a GPU. max_restarts: how often all ranks are started again after a failure that was not an
    error of settings; a run goes on from its last whole checkpoint.

    Returns 0 when every rank ended well, also after a forwarded Ctrl-C or SIGTERM; 128 + the signal when a stop came
    before the ranks could take it; else 1, after printing the first failing rank's error to standard error.

    Raises:
        LaunchError: nproc below 1, or max_restarts below 0.
    """
    if nproc is not None and nproc < 1:
        raise LaunchError(f"--nproc {nproc}", "at least one rank", "--nproc 1")
    if max_restarts < 0:
        raise LaunchError(f"--max-restarts {max_restarts}", "a number of restarts", "--max-restarts 3")
    if nproc == 1 and not max_restarts:
        code = worker.resolve(entry)(argv)
        return code if isinstance(code, int) else 0
    log_dir = Path(log_dir).absolute()
    log_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(max_restarts + 1):
        # Without --nproc the ranks are counted anew: a GPU may have gone.
        code, helps = _launch_once(argv, nproc if nproc is not None else default_nproc(), log_dir, entry)
        if code == 0 or not helps or attempt == max_restarts:
            return code
        print(f"restart {attempt + 1} of {max_restarts}", file=sys.stderr, flush=True)
    raise AssertionError("the last attempt returns")


def _launch_once(argv: list[str], nproc: int, log_dir: Path, entry: str) -> tuple[int, bool]:
    """The exit code, and whether starting again may help."""
    ledgers = ledger_folder.folder_of(uuid.uuid4().hex[:12])
    ledger_folder.sweep(ledgers.parent)  # those of launchers that were killed
    own, scratch = ledger.Ledger(), ledgers / "agent"
    own.open(ledgers / ledger.LAUNCHER, -1, nproc, "")
    scratch.mkdir()
    kills_before = oom_kills()
    environment = {worker.LAUNCHER_PID: str(os.getpid()), worker.LOG_DIR: str(log_dir), ledger.VARIABLE: str(ledgers)}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(threads_per_rank(nproc))
    try:
        with _environment(environment), _agent_log(log_dir / "launcher.log"):
            agent = _agent([entry, *argv], nproc, scratch)
            with _Forwarder(agent) as forwarder:
                result = _run(agent)
        if result is not None and not result.is_failed():
            return 0, False
        failures = result.failures if result is not None else {}
        early = all(failure.exitcode == -signal.SIGTERM for failure in failures.values())
        if forwarder.received and (early or forwarder.killed):
            print("stopped before the ranks could save; nothing more was written", file=sys.stderr)
            return 128 + forwarder.received, False
        positions = ledger_folder.read_folder(ledgers)
        print(describe_failure(failures, log_dir, positions, oom_kills() - kills_before), file=sys.stderr)
        return 1, not forwarder.received and may_pass(failures)
    finally:
        own.close()
        shutil.rmtree(ledgers, ignore_errors=True)


def _agent(arguments: list[str], nproc: int, scratch: Path) -> LocalElasticAgent:
    """torchrun's agent for one machine: rendezvous on a free port of the loopback, no restarts."""
    import torch.distributed.elastic.rendezvous.registry as registry
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host=True,
        timeout=900,
    )
    spec = WorkerSpec(
        role="trainwright",
        local_world_size=nproc,
        rdzv_handler=registry.get_rendezvous_handler(rendezvous),
        entrypoint=sys.executable,
        args=("-m", "trainwright.launch.worker", *arguments),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    # No redirection by the agent: a rank turns its own output to its log, appending, in its first line.
    return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=str(scratch)))


def _run(agent: LocalElasticAgent) -> RunResult | None:
    """The agent's result; None when a signal ended it before there was one."""
    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        return agent.run()
    except (SignalException, KeyboardInterrupt):
        return None
    finally:
        agent.get_worker_group().spec.rdzv_handler.shutdown()


class _Forwarder:
    """Hands this process's stop signals to the ranks and lets the agent go on waiting for them."""

    def __init__(self, agent: LocalElasticAgent) -> None:
        self._agent = agent
        self._old: dict[int, Any] = {}
        self.received = 0
        self.killed = False

    def __enter__(self) -> _Forwarder:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: object) -> None:
        self.killed = number == signal.SIGINT and self.received == signal.SIGINT
        self.received = number
        pids = [rank.id for rank in self._agent.get_worker_group().workers if isinstance(rank.id, int)]
        if not pids:
            raise KeyboardInterrupt  # the ranks have not started: nothing to wait for
        if number == signal.SIGINT and not self.killed:
            os.write(2, b"\nstopping: the ranks save and end; Ctrl-C again kills them\n")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if self.killed else signal.SIGTERM)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that the ranks inherit; taken back afterwards."""
    values = {**values, "TORCHELASTIC_SIGNALS_TO_HANDLE": _SIGNALS_LEFT_TO_AGENT}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _agent_log(path: Path) -> Iterator[None]:
    """The agent's own messages go to a file: what matters of them, the launcher says itself."""
    logger = logging.getLogger("torch.distributed.elastic")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    propagated = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagated
        logger.removeHandler(handler)
        handler.close()
