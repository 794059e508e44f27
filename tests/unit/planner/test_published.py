"""The planner against runs that others measured: errors within what docs/planner.md says, and the order of single choices."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainwright as tw
from trainwright.errors import ConfigError
from trainwright.planner.memory import GIB
from trainwright.planner.published import device_of, measured_tokens_per_s, plan_of, predicted, shape_of

FILE = Path(__file__).parents[3] / "benchmarks" / "published.csv"
with FILE.open(newline="") as file:
    ROWS = {row["id"]: row for row in csv.DictReader(file)}
RESULTS = (
    "tokens_per_s_per_gpu",
    "tflops_per_gpu",
    "mfu_pct",
    "hfu_pct",
    "step_time_s",
    "peak_mem_GiB",
    "notes",
    "source",
    "id",
)


def test_throughput_and_memory_are_near_the_measured() -> None:
    speeds, held = [], []
    for row in ROWS.values():
        found = predicted(row)
        speed = measured_tokens_per_s(row, found.shape)
        if speed is not None:
            speeds.append(abs(found.tokens_per_s / speed - 1))
        if row["peak_mem_GiB"]:
            held.append(abs(found.memory.total / GIB / float(row["peak_mem_GiB"]) - 1))
    assert len(speeds) == 85
    assert len(held) == 30
    assert statistics.median(speeds) <= 0.10
    assert sum(error <= 0.30 for error in speeds) >= 0.90 * len(speeds)
    assert statistics.median(held) <= 0.09


def test_results_are_not_looked_at() -> None:
    for row in ROWS.values():
        blank = {name: "" if name in RESULTS else value for name, value in row.items()}
        missing = {name: value for name, value in row.items() if name not in RESULTS and value}
        assert tw.planner.predict(blank) == tw.planner.predict(row) == tw.planner.predict(missing)
        assert set(tw.planner.predict(blank)) == {"tokens_per_s_per_gpu", "peak_memory_gib", "mfu"}
        assert all(value > 0 for value in tw.planner.predict(blank).values())


# Pairs of one source that differ in one choice: the faster one, the slower one.
PAIRS = {
    "selective before full recomputation, 22B": ("P0321", "P0320"),
    "selective before full recomputation, 530B": ("P0325", "P0324"),
    "interleaved before plain 1F1B": ("P0230", "P0229"),
    "compiled before eager": ("P0225", "P0224"),
    "float8 before bf16": ("P0226", "P0225"),
    "8 GPUs before 512, a GPU": ("P0039", "P0010"),
    "64 GPUs before 512, a GPU": ("P0019", "P0001"),
    "more micro-batches before fewer, in one pipeline": ("P0375", "P0376"),
    "a larger batch a micro-batch before one sequence": ("P0336", "P0334"),
    "a shorter pipeline before a longer one": ("P0340", "P0336"),
    "compiled before eager, FSDP": ("P0260", "P0268"),
    "a shorter sequence before a longer one": ("P0233", "P0234"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_order_of_one_choice_is_the_measured_one(pair: str) -> None:
    fast, slow = (predicted(ROWS[name]) for name in PAIRS[pair])
    measured = [
        measured_tokens_per_s(ROWS[name], found.shape) for name, found in zip(PAIRS[pair], (fast, slow), strict=True)
    ]
    assert measured[0] > measured[1]  # type: ignore[operator]
    assert fast.tokens_per_s > slow.tokens_per_s


def test_what_a_row_is_taken_for() -> None:
    llama = ROWS["P0218"]
    shape = shape_of(llama)
    assert shape.gated
    assert shape.parameters == pytest.approx(8.03e9, rel=0.001)
    assert not shape_of(ROWS["P0333"]).gated
    device = device_of(ROWS["P0266"])  # 400 Gb/s inter-node, over eight GPUs
    assert device.network_bandwidth == pytest.approx(400e9 / 8 / 8)
    assert device_of(ROWS["P0333"]).network_bandwidth == pytest.approx(4 * 100e9 / 8 / 8)
    assert device_of(llama).network_bandwidth == pytest.approx(50e9)
    hsdp = plan_of(ROWS["P0260"], shape_of(ROWS["P0260"]), device_of(ROWS["P0260"]))
    assert (hsdp.zero, hsdp.data, hsdp.replicate, hsdp.shards) == (3, 128, 16, 8)
    torchtitan = plan_of(ROWS["P0229"], shape_of(ROWS["P0229"]), device_of(ROWS["P0229"]))
    assert (torchtitan.micro_batch, torchtitan.micro_batches, torchtitan.interleave) == (4, 8, 1)
    assert torchtitan.tokens_per_step == 256 * 8192
    assert predicted(ROWS["P0844"]).plan.recompute == "full"  # 175B at 6 sequences a GPU fit in no other way


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gpu": "Abacus"}, "no device 'Abacus'"), ({"zero_or_fsdp": "zero9"}, "zero_or_fsdp 'zero9'")],
)
def test_unknown_words_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tw.planner.predict(ROWS["P0218"] | change)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"gpu": "H100"}, {"gpu": "H100-80GB"}),
        ({"gpu": ""}, {"gpu": "H100-80GB"}),
        ({"gpu": "H100-SXM5-80GB"}, {"gpu": "H100-80GB"}),
        ({"precision": "fp8_rowwise"}, {"precision": "fp8"}),
        ({"precision": "mxfp8"}, {"precision": "fp8"}),
        ({"precision": "amp_bf16"}, {"precision": "bf16"}),
        ({"precision": "bfloat16"}, {"precision": "bf16"}),
        ({"precision": "tf32"}, {"precision": "fp32"}),
        ({"recompute": "selective-op"}, {"recompute": "selective"}),
        ({"recompute": "Full"}, {"recompute": "full"}),
        ({"zero_or_fsdp": "FSDP"}, {"zero_or_fsdp": "zero3"}),
        ({"zero_or_fsdp": "zero-3"}, {"zero_or_fsdp": "zero3"}),
        ({"tied_embeddings": "false"}, {"tied_embeddings": "n"}),
        ({"compile": "no"}, {"compile": "n"}),
        ({"global_batch_seqs": "1,024"}, {"global_batch_seqs": "1024"}),
        ({"seq_len": "8k"}, {"seq_len": "8192"}),
        ({"interconnect": "8x400Gb/s IB per node"}, {"interconnect": "8x 400Gb/s IB per node"}),
        ({"interconnect": "EFA 3200 Gb/s"}, {"interconnect": "8x 400 Gb/s"}),
        ({"interconnect": "0 Gb/s"}, {"interconnect": ""}),
        ({"micro_batch": "nan"}, {"micro_batch": ""}),
    ],
)
def test_other_words_for_the_same(change: dict[str, Any], same: dict[str, Any]) -> None:
    row = ROWS["P0225"]
    assert tw.planner.predict(row | change) == tw.planner.predict(row | same)


def test_other_memories_of_a_device() -> None:
    for name, gib in (("V100-16GB", 16), ("A100-SXM4-64GB", 64), ("H100-94GB", 94)):
        assert device_of(ROWS["P0218"] | {"gpu": name}).memory_gib == gib


def test_no_torch_is_needed() -> None:
    code = (
        "import sys, trainwright as tw; tw.planner.predict({'gpu': 'H100', 'n_gpus': 8}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
