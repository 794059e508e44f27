"""`trainwright doctor`: what this machine can do, what is missing, and the remedy.

Each finding is ok, warn (it works, with a limit) or fail (training cannot work as it is). Nothing is changed; what is
written is removed again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .findings import Finding, tell
from .launch.run import threads_per_rank, usable_cores
from .monitor import words
from .monitor.machine import cpu_name, memory_limit_bytes, version_of

_SELF_TEST_TIMEOUT_S = 60


def examine(run_dir: str | Path = ".", *, self_test: bool = True) -> list[Finding]:
    """Looks at everything. run_dir: where runs will be written, for its disk. self_test: also start two processes."""
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _torch,
        _backends,
        _gpus,
        _cores,
        _memory,
        _shared_memory,
        _limits,
        _port,
        lambda: _disk(Path(run_dir)),
        _extras,
    ]
    if self_test:
        checks.append(_all_reduce)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # one check that breaks must not hide the others
            name = getattr(check, "__name__", "check").strip("_<>")
            findings.append(Finding(name, "warn", f"could not be looked at: {type(error).__name__}: {error}"))
    return findings


def run_doctor(run_dir: str | Path = ".", *, as_json: bool = False, self_test: bool = True) -> int:
    """The command: prints the findings; 1 when one of them is `fail`, else 0."""
    return tell(examine(run_dir, self_test=self_test), as_json)


def _python() -> list[Finding]:
    return [Finding("Python", "ok", f"{sys.version.split()[0]} at {sys.executable}")]


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("PyTorch", "fail", f"cannot be imported: {error}", "pip install 'torch>=2.11,<2.14'")]
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    good = (2, 11) <= release < (2, 14)
    findings = [
        Finding(
            "PyTorch",
            "ok" if good else "fail",
            torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ""),
            "" if good else "tested with 2.11 to 2.13: pip install 'torch>=2.11,<2.14'",
        )
    ]
    from trainwright.torch_private import cpu_bf16_is_fast

    flags = _cpu_flags()
    fast = [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX-BF16")) if flag in flags]
    text = f"{cpu_name()}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    if fast and not cpu_bf16_is_fast():
        text += f"; bf16 in hardware ({', '.join(fast)}) but slower than fp32, so bf16 products are made in fp32"
        findings.append(Finding("Processor", "ok", text))
    elif fast:
        findings.append(Finding("Processor", "ok", f"{text}; bf16 in hardware ({', '.join(fast)})"))
    elif torch.cuda.is_available() or not flags:
        findings.append(Finding("Processor", "ok", text))
    else:
        remedy = "on this processor alone train with precision=fp32"
        findings.append(
            Finding("Processor", "warn", f"{text}; no bf16 in hardware, where bf16 is slower than fp32", remedy)
        )
    return findings


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def _backends() -> list[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return [Finding("Collectives", "fail", "torch.distributed is not in this PyTorch", "install the PyTorch wheel")]
    present = [
        name for name, there in (("Gloo", dist.is_gloo_available()), ("NCCL", dist.is_nccl_available())) if there
    ]
    launchers = [name for name in ("torchrun", "mpirun", "srun") if shutil.which(name)]
    findings = [
        Finding("Collectives", "ok", ", ".join(present)),
        Finding("Launchers", "ok", ", ".join(launchers) or "ours"),
    ]
    if torch.cuda.is_available() and not dist.is_nccl_available():
        findings[0] = Finding("Collectives", "fail", ", ".join(present), "GPUs need a PyTorch with NCCL")
    return findings


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            remedy = "install the PyTorch wheel for your CUDA driver (pytorch.org/get-started)"
            return [Finding("GPUs", "warn", "nvidia-smi is here, but PyTorch sees no GPU", remedy)]
        return [Finding("GPUs", "ok", "none: training runs on the processor")]
    findings = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        text = f"{facts.name}, {words.byte_size(free_bytes)} of {words.byte_size(total_bytes)} free"
        busy = free_bytes < 0.9 * total_bytes
        remedy = "another process holds its memory: see nvidia-smi" if busy else ""
        findings.append(Finding(f"GPU {index}", "warn" if busy else "ok", text, remedy))
    return findings


def _cores() -> list[Finding]:
    cores = usable_cores()
    total = os.cpu_count() or cores
    text = f"{cores} usable" + (f" of {total}" if cores < total else "")
    findings = [Finding("Cores", "ok", text)]
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > cores:
        remedy = f"unset it, or export OMP_NUM_THREADS={threads_per_rank(1)}"
        findings.append(Finding("Threads", "warn", f"OMP_NUM_THREADS={threads}, more than the cores", remedy))
    return findings


def _memory() -> list[Finding]:
    import psutil

    limit_bytes, by_container = memory_limit_bytes()
    free_bytes = min(int(psutil.virtual_memory().available), limit_bytes)
    text = f"{words.byte_size(free_bytes)} free of {words.byte_size(limit_bytes)}"
    text += " (the container's limit)" if by_container else ""
    if free_bytes < 2 * 2**30:
        return [Finding("Memory", "warn", text, "a rank needs about 0.5 GiB before its model; use fewer ranks")]
    return [Finding("Memory", "ok", text)]


def _shared_memory() -> list[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return [Finding("Shared memory", "ok", "no /dev/shm on this system")]
    free_bytes = shutil.disk_usage(folder).free
    text = f"{words.byte_size(free_bytes)} free in /dev/shm"
    if free_bytes < 256 * 2**20:
        return [Finding("Shared memory", "warn", text, "NCCL and worker processes need it: docker run --shm-size=8g")]
    return [Finding("Shared memory", "ok", text)]


def _limits() -> list[Finding]:
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = files != resource.RLIM_INFINITY and files < 4096
    said = "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}"
    findings = [Finding("Open files", "warn" if few else "ok", f"limit {said}", "ulimit -n 65536" if few else "")]
    if locked == resource.RLIM_INFINITY:
        findings.append(Finding("Locked memory", "ok", "unlimited"))
    else:
        findings.append(Finding("Locked memory", "ok", f"limit {words.byte_size(locked)} (InfiniBand wants unlimited)"))
    return findings


def _port() -> list[Finding]:
    """The ports that ranks meet and talk on."""
    import socket

    port = int(os.environ.get("MASTER_PORT", "29500"))
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "export MASTER_PORT=29501 (torchrun --master-port); ours takes a free one by itself"
            return [
                Finding("Port", "warn", f"{port}, where torchrun's ranks meet, is not free: {error.strerror}", remedy)
            ]
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        if high - low < 1000:
            remedy = "sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
            return [Finding("Port", "warn", f"only {high - low} ports for connections between ranks", remedy)]
    return [Finding("Port", "ok", f"{port} is free")]


def _disk(run_dir: Path) -> list[Finding]:
    """Free space, and the speed of writing and reading 64 MiB, synced."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return [Finding("Disk", "fail", f"{folder} cannot be written to", "run_dir=FOLDER_THAT_YOU_OWN")]
    if free_bytes < 2**30:
        text = f"{words.byte_size(free_bytes)} free at {folder}"
        return [Finding("Disk", "warn", text, "a checkpoint takes 12 bytes a parameter and more: free some space")]
    size_bytes = 64 * 2**20
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".trainwright-doctor-") as file:
        start_s = time.perf_counter()
        for _ in range(size_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = size_bytes / (time.perf_counter() - start_s)
    text = f"{words.byte_size(free_bytes)} free at {folder}, writes {words.byte_size(speed)}/s"
    if speed < 50 * 2**20:
        return [Finding("Disk", "warn", text, "slow: checkpoint less often (checkpoint.every), or use a local disk")]
    return [Finding("Disk", "ok", text)]


def _extras() -> list[Finding]:
    extras = {
        "hf": ("transformers", "datasets", "pyarrow", "sentencepiece"),
        "track": ("tensorboard", "wandb"),
        "s3": ("s3fs",),
        "gpu": ("torchao",),
    }
    findings = []
    for extra, packages in extras.items():
        here = [f"{name} {version}" for name in packages if (version := version_of(name))]
        missing = [name for name in packages if not version_of(name)]
        text = ", ".join(here) or "not installed"
        if here and missing:
            text += f"; without {', '.join(missing)}"
        remedy = f"if you want it: pip install 'trainwright[{extra}]'" if missing else ""
        findings.append(Finding(f"Extra {extra}", "ok", text, remedy))
    return findings


def _all_reduce() -> list[Finding]:
    """Two processes on this machine sum a tensor over Gloo, started as a training run's ranks are."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import sys; from trainwright.launch.run import launch_local; "
            "sys.exit(launch_local([], 2, sys.argv[1], entry='trainwright.launch.self_test:main'))"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start_s = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, folder],
                capture_output=True,
                text=True,
                timeout=_SELF_TEST_TIMEOUT_S,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            remedy = "a firewall on the loopback? try: export GLOO_SOCKET_IFNAME=lo"
            text = f"two ranks did not finish an all-reduce in {_SELF_TEST_TIMEOUT_S} s"
            return [Finding("Two ranks", "fail", text, remedy)]
    elapsed_s = time.perf_counter() - start_s
    if done.returncode != 0:
        text = done.stderr.strip()[-800:] or f"exit code {done.returncode}"
        return [Finding("Two ranks", "fail", text, "try: export GLOO_SOCKET_IFNAME=lo")]
    return [Finding("Two ranks", "ok", f"all-reduce over Gloo right, in {words.duration(elapsed_s)} with their start")]
