"""What devices and their links can do: rated figures with their sources, and the share of them that kernels reach.

Rated figures are the makers' data sheets' (dense, without sparsity). The shares are one efficiency curve a generation,
fitted to published runs (docs/planner.md); those of devices without such runs are their generation's.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainwright.config.yaml_reader import read_file
from trainwright.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator and the node that it usually sits in. Rates are of one device; those of links in one direction."""

    name: str
    tflops: float
    """Dense bf16 or fp16 matrix products with fp32 sums, 10^12 a second."""
    tflops_8bit: float | None
    """The same in float8; None: it has no such units."""
    memory_gib: float
    bandwidth: float
    """Of memory, bytes a second."""
    node_bandwidth: float
    """To the other devices of its node, bytes a second."""
    network_bandwidth: float
    """To other nodes, bytes a second: its share of the node's."""
    per_node: int
    multiprocessors: int
    source: str
    product: float = 0.65
    """Share of `tflops` that large products reach under a training's power and clocks."""
    product_8bit: float = 0.64
    """The same of `tflops_8bit`, with the casts' share of the work left out."""
    attention: float = 0.43
    """Speed of FlashAttention 2 over a large product's."""
    host_gib: float = 128.0
    """Of the host's memory, its share."""
    host_link_bandwidth: float = 32e9
    """To the host, bytes a second in one direction."""
    host_bandwidth: float = 25e9
    """Of the host's memory, its share, bytes a second."""
    host_source: str = "an assumption: PCIe 4, a host of 1 TB with eight channels of DDR4-3200 for eight devices"


_DGX_A100 = "NVIDIA A100 data sheet (2021); DGX A100: NVLink 3, 8x HDR 200 Gb/s"
_DGX_H100 = "NVIDIA H100 data sheet (2023); DGX H100: NVLink 4, 8x NDR 400 Gb/s"
_B200 = "NVIDIA DGX B200 data sheet (2024): NVLink 5, 8x NDR 400 Gb/s"
_VOLTA: dict[str, Any] = {"product": 0.86, "attention": 0.6}
_AMPERE: dict[str, Any] = {"product": 0.73, "attention": 0.9}
_HOPPER: dict[str, Any] = {"product": 0.65, "product_8bit": 0.64, "attention": 0.43}
_BLACKWELL: dict[str, Any] = {"product": 0.61, "product_8bit": 0.48, "attention": 0.78}


def _host(gib: float, link: float, rate: float, source: str) -> dict[str, Any]:
    return {"host_gib": gib, "host_link_bandwidth": link, "host_bandwidth": rate, "host_source": source}


_VOLTA |= _host(96, 16e9, 16e9, "DGX-2 user guide: 1.5 TB, PCIe 3; two Xeon 8168 of six channels DDR4-2666")
_AMPERE |= _host(
    128,
    32e9,
    51e9,
    "DGX A100 user guide: 1 TB (2 TB with 80 GB devices), PCIe 4; two EPYC 7742 of eight channels DDR4-3200",
)
_HOPPER |= _host(256, 64e9, 77e9, "DGX H100 user guide: 2 TB, PCIe 5; two Xeon 8480C of eight channels DDR5-4800")
_BLACKWELL |= _host(256, 64e9, 90e9, "DGX B200 user guide: 2 TB, PCIe 5; two Xeon 8570 of eight channels DDR5-5600")
_GRACE = _BLACKWELL | _host(
    240, 225e9, 256e9, "NVIDIA Grace data sheet: 480 GB of LPDDR5X at 512 GB/s and NVLink-C2C for two devices"
)
_FRONTIER = _host(
    64, 36e9, 25e9, "Frontier user guide (OLCF): 512 GB of DDR4-3200 for eight dies, Infinity Fabric of 36 GB/s"
)
_MI300X = _host(256, 64e9, 115e9, "platforms of two EPYC 9004 of twelve channels DDR5-4800, 2 TB, PCIe 5")
_DESK = _host(64, 32e9, 25e9, "an assumption: a desk's host of 64 GiB a card, dual-channel DDR5 among them")

_LIST = (
    # name, TFLOP/s, 8-bit, GiB, memory's bytes/s, node's, network's, devices a node, multiprocessors
    Device("V100-32GB", 125.0, None, 32, 0.9e12, 150e9, 12.5e9, 16, 80,
           "NVIDIA V100 data sheet (2020); DGX-2: NVSwitch, 8x 100 Gb/s", **_VOLTA),
    Device("A100-40GB", 312.0, None, 40, 1.555e12, 300e9, 25e9, 8, 108, _DGX_A100, **_AMPERE),
    Device("A100-80GB", 312.0, None, 80, 2.039e12, 300e9, 25e9, 8, 108, _DGX_A100, **_AMPERE),
    Device("H100-80GB", 989.5, 1979.0, 80, 3.35e12, 450e9, 50e9, 8, 132, _DGX_H100, **_HOPPER),
    Device("H100-PCIe-80GB", 756.0, 1513.0, 80, 2.0e12, 64e9, 50e9, 8, 114, "NVIDIA H100 PCIe data sheet (2023)", **_HOPPER),
    Device("H100-96GB-HBM2e-500W", 989.5, 1979.0, 96, 2.4e12, 450e9, 50e9, 8, 132,
           "torchtitan's benchmarks (2024): H100 of 500 W with HBM2e", **_HOPPER | {"product": 0.57, "product_8bit": 0.46}),
    Device("H200-141GB", 989.5, 1979.0, 141, 4.8e12, 450e9, 50e9, 8, 132, "NVIDIA H200 data sheet (2024)", **_HOPPER),
    Device("B200", 2250.0, 4500.0, 180, 8.0e12, 900e9, 50e9, 8, 148, _B200, **_BLACKWELL),
    Device("GB200", 2500.0, 5000.0, 186, 8.0e12, 900e9, 50e9, 72, 148, "NVIDIA GB200 NVL72 data sheet (2024)", **_GRACE),
    Device("B300", 2250.0, 4500.0, 270, 8.0e12, 900e9, 100e9, 8, 148, "NVIDIA DGX B300 data sheet (2025)", **_BLACKWELL),
    Device("GB300", 2500.0, 5000.0, 279, 8.0e12, 900e9, 100e9, 72, 152, "NVIDIA GB300 NVL72 data sheet (2025)", **_GRACE),
    Device("MI250X", 191.5, None, 64, 1.638e12, 100e9, 12.5e9, 8, 110,
           "AMD Instinct MI250X data sheet (2021), one of its two dies, as schedulers count them", product=0.55, **_FRONTIER),
    Device("MI300X", 1307.4, 2614.9, 192, 5.3e12, 448e9, 50e9, 8, 304, "AMD Instinct MI300X data sheet (2023)",
           product=0.45, product_8bit=0.4, **_MI300X),
    Device("RTX-3090", 71.0, None, 24, 0.936e12, 16e9, 3.1e9, 8, 82, "NVIDIA GA102 whitepaper (2020); PCIe 4", **_AMPERE | _DESK),
    Device("RTX-4090", 165.2, 330.3, 24, 1.008e12, 16e9, 3.1e9, 8, 128, "NVIDIA Ada whitepaper (2022); PCIe 4", **_AMPERE | _DESK),
    Device("RTX-5090", 209.5, 419.0, 32, 1.792e12, 32e9, 3.1e9, 8, 170, "NVIDIA RTX Blackwell whitepaper (2025)", **_BLACKWELL | _DESK),
    Device("L40S", 362.0, 733.0, 48, 0.864e12, 32e9, 12.5e9, 8, 142, "NVIDIA L40S data sheet (2023); PCIe 4", **_AMPERE),
)  # fmt: skip
DEVICES = {device.name: device for device in _LIST}


def device_named(name: str) -> Device:
    """Of the catalogue: by its name, by the beginning of it where one device alone has that, or its generation's with the memory
    that the name tells ("V100-16GB", "A100-SXM4-64GB"); drivers' names too ("NVIDIA H100 80GB HBM3", "Tesla V100-PCIE-16GB").
    Raises ConfigError with the names there are."""
    wanted = _MAKERS.sub("", re.sub(r"[\s_]+", "-", name.strip().lower()))
    found = _found(wanted, name)
    if "pcie" in wanted and "PCIe" not in found.name + found.source:
        return replace(found, node_bandwidth=min(found.node_bandwidth, _PCIE_4))
    return found


def _found(wanted: str, name: str) -> Device:
    for key, device in DEVICES.items():
        if key.lower() == wanted:
            return device
    alike = [d for key, d in DEVICES.items() if wanted and key.lower().startswith(wanted + "-")]
    if len(alike) == 1 or (alike and alike[0].name == _USUAL.get(wanted)):
        return alike[0]
    usual = DEVICES.get(_USUAL.get(re.split(r"[-/]", wanted)[0], ""))
    memory = re.search(r"(\d+)\s*g(?:i?b)?\b", wanted)
    if wanted.startswith("a100") and memory:
        usual = DEVICES.get(f"A100-{memory[1]}GB", DEVICES["A100-80GB"])
    if wanted.startswith("gh200"):  # what its name tells is Grace's
        memory = None
    if usual is not None and (
        memory or wanted.split("-")[0] == "gh200" or wanted in _USUAL or "sxm" in wanted or "nvl" in wanted
    ):
        return replace(usual, memory_gib=float(memory[1])) if memory else usual
    raise ConfigError(
        f"no device {name!r} in the catalogue",
        f"one of {', '.join(DEVICES)}",
        f"--hardware 8x{alike[0].name if alike else 'H100-80GB'}, or a file of your own (8xmine.yaml, docs/planner.md)",
    )


_MAKERS = re.compile(r"^((nvidia|amd|tesla|geforce|instinct)-)+")
_PCIE_4 = 32e9
"""Bytes a second, one direction, of 16 lanes."""
_USUAL = {
    "v100": "V100-32GB", "h100": "H100-80GB", "h800": "H100-80GB", "gh200": "H200-141GB", "h200": "H200-141GB", "b200": "B200",
    "gb200": "GB200", "b300": "B300", "gb300": "GB300", "mi300x": "MI300X", "mi250x": "MI250X", "l40s": "L40S",
}  # fmt: skip
"""What a bare name means, and whose kind a device of another memory is. An A100 without its memory is told back."""


def device_from_file(path: Path) -> Device:
    """Of one's own: a YAML file with `like`, a device of the catalogue, and what differs from it, in `Device`'s words.

    Raises ConfigError for a file that is not there, an unknown word and a value that is no positive number.
    """
    given = dict(read_file(path))
    base = device_named(str(given.pop("like", "")))
    known = asdict(base)
    for key, value in list(given.items()):
        if key not in known:
            raise ConfigError(
                f"{key} in {path}",
                f"a device has {', '.join(known)}; like names one of the catalogue",
                "like: H100-80GB",
            )
        if key in ("name", "source", "host_source"):
            continue
        if key == "tflops_8bit" and value is None:
            continue
        given[key] = number = _number(value)
        least, most = (1, math.inf) if key in _WHOLE else (0, 1 if key in _SHARES else math.inf)
        if number is None or not least <= number <= most or not number or (key in _WHOLE and number != int(number)):
            rule = "a whole number" if key in _WHOLE else "a share up to 1" if key in _SHARES else "a positive number"
            raise ConfigError(f"{key}: {value!r} in {path}", rule, f"{key}: {known[key]}")
    values: dict[str, Any] = {key: int(value) if key in _WHOLE else value for key, value in given.items()}
    return replace(base, **({"name": path.stem, "source": str(path)} | values))


_WHOLE = frozenset({"per_node", "multiprocessors"})
_SHARES = frozenset({"product", "product_8bit", "attention"})


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 25e9 as a word."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
