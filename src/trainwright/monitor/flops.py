"""Model FLOPs utilisation (MFU), the peak that it is measured against, and peak memory.

MFU = (model FLOPs a token x tokens/s) / (peak FLOP/s of one device x devices), after PaLM (arXiv 2204.02311,
appendix B). Model FLOPs are those of one forward and one backward of the mathematics, about 6 x parameters a token
and 12 x layers x D x T for attention; what recomputation repeats is not counted, so recomputing lowers the MFU.
On a known GPU the peak is the maker's dense figure. Elsewhere it is the speed of a matrix product, measured in this
process with its threads: "100%" is then what this machine's own matrix product reaches here, now, not a data sheet.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense (no sparsity) tensor-core peaks from the makers' data sheets, FLOP/s: (bf16 and fp16, fp32 with TF32 off, fp64).
# The first entry whose name is part of the device's name counts, so longer names come first.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("GB200", (2.5e15, 80e12, 40e12)),
    ("B200", (2.25e15, 75e12, 37e12)),
    ("B100", (1.75e15, 60e12, 30e12)),
    ("H100 PCIe", (756e12, 51e12, 51e12)),
    ("H100 NVL", (835e12, 60e12, 60e12)),
    ("GH200", (989e12, 67e12, 67e12)),
    ("H200", (989e12, 67e12, 67e12)),
    ("H100", (989e12, 67e12, 67e12)),
    ("H800", (989e12, 67e12, 1e12)),
    ("H20", (148e12, 44e12, 1e12)),
    ("A100", (312e12, 19.5e12, 19.5e12)),
    ("A800", (312e12, 19.5e12, 9.7e12)),
    ("A10G", (70e12, 35e12, 0.5e12)),
    ("A10", (125e12, 31.2e12, 0.5e12)),
    ("A40", (149.7e12, 37.4e12, 0.6e12)),
    ("L40S", (362e12, 91.6e12, 1.4e12)),
    ("L40", (181e12, 90.5e12, 1.4e12)),
    ("L4", (121e12, 30.3e12, 0.5e12)),
    ("V100", (125e12, 15.7e12, 7.8e12)),
    ("T4", (65e12, 8.1e12, 0.25e12)),
    ("RTX 4090", (165.2e12, 82.6e12, 1.3e12)),
    ("RTX 3090", (71e12, 35.6e12, 0.56e12)),
)


def catalogue_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The maker's dense peak of a GPU for matrix products in `dtype`, FLOP/s; None for an unknown GPU or dtype."""
    column = {"bfloat16": 0, "float16": 0, "float32": 1, "float64": 2}.get(str(dtype).removeprefix("torch."))
    if column is None:
        return None
    name = device_name.lower()
    return next((peaks[column] for known, peaks in _PEAKS if known.lower() in name), None)


def measure_matmul_flops(dtype: torch.dtype, device: torch.device | str = "cpu", budget_s: float = 0.4) -> float:
    """Speed of a square matrix product in this process with its current threads, FLOP/s (2 n^3 a product).

    The matrices grow until a product takes long enough to time, and the best of the repetitions within `budget_s`
    seconds counts, because other load can only slow a product down. Takes under a second.
    """
    import torch

    where = torch.device(device)
    side = 128 if where.type == "cpu" else 1024
    deadline = time.perf_counter() + budget_s
    best_flops = 0.0
    with torch.no_grad():
        while True:
            left = torch.full((side, side), 0.5, dtype=dtype, device=where)
            right = torch.full((side, side), 0.25, dtype=dtype, device=where)
            _timed_product(left, right)  # the first call picks kernels and allocates
            elapsed_s = _timed_product(left, right)
            best_flops = max(best_flops, 2.0 * side**3 / elapsed_s)
            # Another doubling costs about 8 times two products: only while that fits.
            if 16 * elapsed_s < deadline - time.perf_counter() and side < 16384:
                side *= 2
                continue
            while time.perf_counter() + elapsed_s < deadline:
                elapsed_s = _timed_product(left, right)
                best_flops = max(best_flops, 2.0 * side**3 / elapsed_s)
            return best_flops


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """Seconds of one product; waits for the device."""
    import torch

    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    start_s = time.perf_counter()
    torch.mm(left, right.t())  # the layout of a linear layer, which CPUs have their fast kernels for
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return max(time.perf_counter() - start_s, 1e-9)


def peak_flops(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[float, str]:
    """Peak of this process's device for matrix products in `dtype`, FLOP/s, and where the figure comes from."""
    import torch

    where = torch.device(device)
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        known = catalogue_flops(name, dtype)
        if known is not None:
            return known, f"{name}, dense {str(dtype).removeprefix('torch.')} peak of its data sheet"
    return measure_matmul_flops(dtype, where), f"measured {str(dtype).removeprefix('torch.')} matrix product"


def mfu(flops_per_token: float, tokens_per_s: float, peak: float) -> float | None:
    """Share of the peak that the model's mathematics uses, 0..1; None where a figure is missing.

    flops_per_token: forward and backward of one token. tokens_per_s: of all ranks together.
    peak: FLOP/s of all ranks' devices together (one device's peak x ranks; on CPUs the sum of the ranks' measurements,
    taken at the same time, because ranks share the machine).
    """
    if not (flops_per_token > 0 and tokens_per_s > 0 and peak > 0):
        return None
    return flops_per_token * tokens_per_s / peak


def resident_bytes() -> int:
    """What this process holds now, of memory that is its own or mapped."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory that this rank has held so far.

    CUDA: the allocator's `max_memory_allocated`. CPU: the process's largest resident set (`ru_maxrss`), which counts
    everything: the interpreter, libraries, the mapped pages of the data set that were touched.
    """
    import torch

    where = torch.device(device)
    if where.type == "cuda":
        return int(torch.cuda.max_memory_allocated(where))
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # Linux counts KiB
