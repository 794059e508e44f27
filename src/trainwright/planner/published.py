"""Measured runs of others: a row of their table to a shape, a plan and a device, and what we would have predicted.

The columns are those of benchmarks/published.csv. An empty cell has a default, stated where it is given: the habit of the
field or of the framework that the other cells show, not a value fitted to a row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.errors import ConfigError
from trainwright.planner.constants import DEFAULT, Constants
from trainwright.planner.hardware import DEVICES, Device, device_named
from trainwright.planner.memory import GIB, Memory, memory
from trainwright.planner.step_time import StepTime, step_time
from trainwright.planner.workload import ModelShape, Plan, Precision, Recompute

Row = Mapping[str, Any]
_FASTEST_LINK = 800
"""Gb/s of one network card: what is faster is a node's sum."""
_ZERO = {
    "": 0,
    "none": 0,
    "no": 0,
    "ddp": 0,
    "zero0": 0,
    "zero1": 1,
    "zero2": 2,
    "zero3": 3,
    "fsdp": 3,
    "fsdp1": 3,
    "fsdp2": 3,
    "hsdp": 3,
}


@dataclass(frozen=True)
class Predicted:
    """What a row's run is taken for, and what comes of it."""

    shape: ModelShape
    plan: Plan
    device: Device
    step: StepTime
    memory: Memory

    @property
    def tokens_per_s(self) -> float:
        """A second and GPU."""
        return self.plan.tokens_per_step / self.step.total / self.plan.ranks

    @property
    def mfu(self) -> float:
        """Share of the device's dense bf16 rate that the model's FLOPs come to (PaLM's count, arXiv 2204.02311, B)."""
        return self.tokens_per_s * self.shape.flops_per_token(self.plan.sequence_length) / (self.device.tflops * 1e12)


def predict(row: Row) -> dict[str, float]:
    """`tokens_per_s_per_gpu`, `peak_memory_gib` and `mfu` (percent of the dense bf16 rate) of a run as a row of
    benchmarks/published.csv describes it.

    The columns of results, notes, source and id are not looked at. Raises ConfigError for a device that is not in the
    catalogue and for a strategy of another name.
    """
    found = predicted(row)
    return {
        "tokens_per_s_per_gpu": found.tokens_per_s,
        "peak_memory_gib": found.memory.total / GIB,
        "mfu": 100 * found.mfu,
    }


def predicted(row: Row, constants: Constants = DEFAULT, devices: Mapping[str, Device] = DEVICES) -> Predicted:
    """The same with all that it was made from."""
    shape, device = shape_of(row), device_of(row, devices)
    plan = plan_of(row, shape, device)
    return Predicted(shape, plan, device, step_time(shape, plan, device, constants), memory(shape, plan, constants))


def measured_tokens_per_s(row: Row, shape: ModelShape) -> float | None:
    """Tokens a second and GPU: the row's own, or else from its step's time, its TFLOP/s or its MFU, in this order."""
    told = _number(row, "tokens_per_s_per_gpu")
    if told is not None:
        return told
    step_s, batch, length = _number(row, "step_time_s"), _number(row, "global_batch_seqs"), _whole(row, "seq_len", 2048)
    if step_s is not None and batch is not None:
        return batch * length / step_s / _whole(row, "n_gpus", 1)
    tflops = _number(row, "tflops_per_gpu")
    if tflops is None:
        mfu, peak = _number(row, "mfu_pct"), _number(row, "peak_tflops_assumed")
        if mfu is None or peak is None:
            return None
        tflops = mfu / 100 * peak
    again = 4 / 3 if _text(row, "flops_kind") == "hardware" and _recompute(row) == "full" else 1.0
    return tflops * 1e12 / (again * shape.flops_per_token(length))


# --- a row's cells -------------------------------------------------------------------------------------------------


def _text(row: Row, name: str) -> str:
    text = str(row.get(name) if row.get(name) is not None else "").strip()
    return "" if text.lower() == "nan" else text


def _number(row: Row, name: str) -> float | None:
    """The first number of the cell, "1,024", "8k" and "4M" included; None without one."""
    found = re.search(r"(\d[\d,]*\.?\d*(?:e[+-]?\d+)?)\s*([kKmMbB]?)", _text(row, name))
    if found is None:
        return None
    return float(found[1].replace(",", "")) * {"": 1, "k": 1024, "m": 1e6, "b": 1e9}[found[2].lower()]


def _says_no(row: Row, name: str) -> bool:
    return _text(row, name).lower() in ("n", "no", "false", "0", "off")


def _whole(row: Row, name: str, default: int) -> int:
    value = _number(row, name)
    return default if value is None else max(1, int(value))


def shape_of(row: Row) -> ModelShape:
    """The model: feed-forward blocks of 4 D, a vocabulary of 50,304, tied tables and as many key heads as query heads where
    the row does not say. Whether the feed-forward block is gated is read off its size: the kind nearer to `params_B`."""
    layers, dim, heads = _whole(row, "n_layers", 32), _whole(row, "d_model", 4096), _whole(row, "n_heads", 32)
    ffn_dim = _whole(row, "d_ff", 4 * dim)
    plain = ModelShape(
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=_whole(row, "n_kv_heads", heads),
        ffn_dim=ffn_dim,
        vocab_size=_whole(row, "vocab", 50304),
        gated=False,
        tied=not _says_no(row, "tied_embeddings"),
    )
    gated = dataclasses.replace(plain, gated=True)
    told = _number(row, "params_B")  # a "B" behind it would be one too many
    told = told / 1e9 if told is not None and told > 1e6 else told
    if told is None:
        return plain if ffn_dim >= 4 * dim else gated
    return min(plain, gated, key=lambda shape: abs(shape.parameters - told * 1e9))


def device_of(row: Row, devices: Mapping[str, Device] = DEVICES) -> Device:
    """The device, with the network that the row's `interconnect` tells: so many Gb/s a GPU, "4x" or "8x" links a node, or
    one rate a node ("inter-node"). By default its usual one."""
    named = device_named(_text(row, "gpu") or "H100-80GB")
    device = dataclasses.replace(devices.get(named.name, named), memory_gib=named.memory_gib)
    links = r"(?:(\d+)\s*[x×]\s*)?(?:[A-Za-z]+\s+)?(\d+(?:\.\d+)?)\s*G(?:b/s|bps|bit/s)(.{0,20})"
    found = re.search(links, _text(row, "interconnect"))
    if found is None or not float(found[2]):
        return device
    rate = float(found[2]) * 1e9 / 8
    if found[1]:
        rate *= int(found[1]) / device.per_node
    elif "node" in found[3] or float(found[2]) > _FASTEST_LINK:
        rate /= device.per_node
    return dataclasses.replace(device, network_bandwidth=rate)


def plan_of(row: Row, shape: ModelShape, device: Device) -> Plan:
    """The strategy. Where the row is silent: sequence beside tensor parallelism; two parts of the model a pipeline's rank,
    but one in eager loops and before 2022; no recomputation if that fits, else the least that does."""
    kind = _text(row, "zero_or_fsdp").lower().replace("-", "").replace(" ", "")
    if kind not in _ZERO:
        raise ConfigError(f"zero_or_fsdp {kind!r}", f"one of {', '.join(k for k in _ZERO if k)}, or empty", "zero3")
    zero = _ZERO[kind]
    tensor, pipeline, context = (_whole(row, name, 1) for name in ("tp", "pp", "cp"))
    data = _whole(row, "dp", max(1, _whole(row, "n_gpus", 8) // (tensor * pipeline * context)))
    micro_batch, micro_batches = _micro_batches(row, data, pipeline)
    precision, recompute = _precision(row), _recompute(row)
    old, eager = _before_fused_attention(row, shape), _says_no(row, "compile")
    in_backward = "fused in backward" in _text(row, "optimizer")
    plan = Plan(
        zero=zero,
        data=data,
        tensor=tensor,
        sequence_parallel=tensor > 1 and not _says_no(row, "sp"),
        pipeline=pipeline,
        interleave=_whole(row, "vpp", 2 if pipeline > 1 and not old and not eager else 1),
        context=context,
        replicate=max(1, data // device.per_node) if kind == "hsdp" else 1,
        sequence_length=_whole(row, "seq_len", 2048),
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        precision=precision,
        recompute=recompute or "none",
        compiled=old or not eager,  # Megatron had kernels of its own
        fused_attention=not old,
        fused_loss=in_backward,  # torchtune's, in the same list of options
        vendor_attention=not old and zero == 1 and not _text(row, "compile"),  # NVIDIA's Megatron and NeMo
        fused_update=in_backward,
        pure=in_backward,
        reduce_bytes=2 if zero == 3 or precision == "fp16" else 4,
        overlapped=not old,
    )
    return plan if recompute is not None else _with_least_recompute(plan, shape, device)


def _precision(row: Row) -> Precision:
    """bf16 where the row does not tell; "fp8-cs", "mxfp8" and fp4 products with 8-bit gradients count as fp8."""
    text = _text(row, "precision").lower()
    if "fp8" in text or "float8" in text or "fp4" in text:
        return "fp8"
    if "fp16" in text or "float16" in text.replace("bfloat16", ""):
        return "fp16"
    return "fp32" if "32" in text and "b" not in text else "bf16"


def _recompute(row: Row) -> Recompute | None:
    """None where the row does not tell."""
    text = _text(row, "recompute").lower()
    if not text:
        return None
    if text.startswith("sel"):
        return "selective"
    return "none" if text.startswith(("no", "off", "0", "false")) or text == "n" else "full"


def _with_least_recompute(plan: Plan, shape: ModelShape, device: Device) -> Plan:
    least: tuple[Recompute, ...] = ("none", "selective")
    for recompute in least:
        tried = dataclasses.replace(plan, recompute=recompute)
        if memory(shape, tried).total / GIB < 0.95 * device.memory_gib:
            return tried
    return dataclasses.replace(plan, recompute="full")


def _micro_batches(row: Row, data: int, pipeline: int) -> tuple[int, int]:
    """(sequences each, how many a step). Not told: in a pipeline one sequence, or under torch.compile (torchtitan's) as many
    micro-batches as ranks; elsewhere at most four sequences."""
    batch = _number(row, "global_batch_seqs")
    local = (batch or data) / data
    told = _number(row, "micro_batch")
    if told is not None:
        size = told
    elif pipeline > 1:
        size = local // pipeline if _text(row, "compile").lower().startswith("y") else 1
    else:
        size = min(4, local)
    size = max(1, int(size))
    return size, 1 if batch is None else max(1, round(local / size))


def _before_fused_attention(row: Row, shape: ModelShape) -> bool:
    """Megatron's runs and its forks' of 2019 to 2022, without FlashAttention and without transfers beside computation: in
    fp16 or with tensor parallelism, on devices of those years, before gated blocks."""
    early = _text(row, "gpu").startswith(("V100", "A100"))
    return early and not shape.gated and (_text(row, "precision") in ("fp16", "") or _whole(row, "tp", 1) > 1)
