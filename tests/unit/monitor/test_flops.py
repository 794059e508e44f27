"""MFU's parts. Speeds are never asserted: only that they are what they claim to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainwright.monitor import flops


def test_measured_speed_counts_the_products_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def timed(left: torch.Tensor, right: torch.Tensor) -> float:
        sides.append(left.shape[0])
        return 2.0 * left.shape[0] ** 3 / 1e9  # a machine of exactly 1 GFLOP/s

    monkeypatch.setattr(flops, "_timed_product", timed)
    assert flops.measure_matmul_flops(torch.float32, budget_s=0.001) == pytest.approx(1e9)
    assert sides[0] == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_measured_speed_is_positive(dtype: torch.dtype) -> None:
    peak, source = flops.peak_flops(dtype)
    assert peak > 0
    assert "measured" in source


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H20", torch.bfloat16, 148e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5e12),
        ("Some other GPU", torch.bfloat16, None),
        ("NVIDIA A100", torch.int8, None),
    ],
)
def test_catalogue(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert flops.catalogue_flops(name, dtype) == peak


def test_mfu_formula() -> None:
    # PaLM's appendix B: tokens/s x FLOPs a token over the peak.
    assert flops.mfu(6e9, 1000.0, 1.2e13) == pytest.approx(0.5)
    assert flops.mfu(0.0, 1000.0, 1e12) is None
    assert flops.mfu(6e9, 1000.0, 0.0) is None


def test_peak_memory_is_the_kernels_high_water_mark() -> None:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc on this system to compare with")
    peak_bytes = flops.peak_memory_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_bytes == pytest.approx(int(line.split()[1]) * 1024, rel=0.02)
