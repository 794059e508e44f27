"""Step time and memory: what has to hold whatever the constants are, and formulas worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.errors import ConfigError
from trainwright.parallel.pipeline.balance import partition
from trainwright.planner.constants import DEFAULT
from trainwright.planner.hardware import DEVICES, device_named
from trainwright.planner.memory import GIB, block_activations, memory
from trainwright.planner.step_time import Costs, step_time
from trainwright.planner.workload import ModelShape, Plan, rank_blocks

SHAPE = ModelShape(32, 4096, 32, 8, 14336, 128256, gated=True, tied=False)
H100 = device_named("H100-80GB")
PLAN = Plan(zero=3, data=64, sequence_length=8192, micro_batch=1, micro_batches=2, recompute="full")


@pytest.mark.parametrize(
    ("told", "name", "memory_gib", "node_bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB", 80, 450e9),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB", 80, 64e9),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", 40, 300e9),
        ("NVIDIA A100 80GB PCIe", "A100-80GB", 80, 32e9),
        ("Tesla V100-SXM2-16GB", "V100-32GB", 16, 150e9),
        ("NVIDIA H200", "H200-141GB", 141, 450e9),
        ("NVIDIA B200", "B200", 180, 900e9),
        ("NVIDIA GeForce RTX 4090", "RTX-4090", 24, 16e9),
        ("NVIDIA L40S", "L40S", 48, 32e9),
        ("AMD Instinct MI300X", "MI300X", 192, 448e9),
        ("NVIDIA GH200 480GB", "H200-141GB", 141, 450e9),
    ],
)
def test_drivers_names_are_understood(told: str, name: str, memory_gib: float, node_bandwidth: float) -> None:
    device = device_named(told)
    assert (device.name, device.memory_gib, device.node_bandwidth) == (name, memory_gib, node_bandwidth)


@pytest.mark.parametrize("told", ["NVIDIA H20", "NVIDIA L40", "NVIDIA L4", "NVIDIA A10", "Tesla T4"])
def test_others_are_not_taken_for_what_they_are_called_like(told: str) -> None:
    with pytest.raises(ConfigError, match="no device"):
        device_named(told)


def test_the_parts_are_the_whole() -> None:
    step = step_time(SHAPE, PLAN, H100)
    assert step.total == pytest.approx(sum(dataclasses.astuple(step)))
    assert all(value >= 0 for value in dataclasses.astuple(step))
    held = memory(SHAPE, PLAN)
    assert held.total == pytest.approx(sum(dataclasses.astuple(held)))


def test_parameters_and_flops_by_hand() -> None:
    assert SHAPE.parameters == 8_029_995_008  # Llama 3 8B without its 65 norms of 4,096
    assert SHAPE.parameters + 65 * 4096 == 8_030_261_248
    assert SHAPE.flops_per_token(0) == 6 * (SHAPE.parameters - SHAPE.embedding_parameters)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_model_states_are_zeros_own(zero: int) -> None:
    plan = Plan(zero=zero, data=8)
    held = memory(SHAPE, plan)
    n = SHAPE.parameters
    if zero == 3:  # fp32 shards and moments
        assert held.parameters + held.gradients + held.optimizer == 16 * n / 8
    else:
        assert held.parameters == 2 * n
        assert held.gradients == 4 * n / (8 if zero == 2 else 1)
        assert held.optimizer == 12 * n / (8 if zero else 1)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_model_states_of_our_stages(zero: int) -> None:
    """fp32 masters and moments are sharded; compute copies in 16 bits and, below stage 2, gradients are whole."""
    held = memory(SHAPE, Plan(zero=zero, data=8, micro_batches=4, sharded_masters=True))
    n = SHAPE.parameters
    shards = 8 if zero else 1
    assert held.parameters == 4 * n / shards + (0 if zero == 3 else 2 * n)
    assert held.optimizer == 8 * n / shards
    assert held.gradients == 4 * n / (8 if zero >= 2 else 1)


def test_bf16_masters_halve_what_is_sharded_and_not_what_waits_to_be_reduced() -> None:
    words = {"data": 8, "sharded_masters": True, "masters": "bf16_kahan", "moments": "8bit"}
    n = SHAPE.parameters
    held = memory(SHAPE, Plan(zero=2, micro_batches=4, **words))  # type: ignore[arg-type]
    assert (held.parameters, held.gradients) == (2 * n / 8 + 2 * n, 2 * n / 8)
    assert held.optimizer == pytest.approx((2 + 8 / 64 + 2) * n / 8)
    assert memory(SHAPE, Plan(zero=1, micro_batches=4, **words)).gradients == 4 * n  # type: ignore[arg-type]
    alone = Plan(zero=0, masters="bf16_kahan", data=1, sharded_masters=True)
    assert memory(SHAPE, alone).parameters == 4 * n  # fp32 reduction: FSDP has copies
    assert memory(SHAPE, dataclasses.replace(alone, reduce_bytes=2)).parameters == 2 * n


def test_pipelines_are_cut_as_the_engine_cuts_them() -> None:
    for vocab_size in (1024, 128256, 1_000_000):
        shape = dataclasses.replace(SHAPE, vocab_size=vocab_size)
        costs = [float(shape.block_parameters)] * shape.layers
        costs[-1] += shape.embedding_parameters
        for parts in (2, 4, 7, 8):
            cut = [stop - start for start, stop in partition(costs, parts)]
            blocks = rank_blocks(shape, parts, 1)
            assert sum(blocks) == shape.layers

            def slowest(
                sizes: Sequence[int], head: float = shape.embedding_parameters / shape.block_parameters
            ) -> float:
                return max(*sizes[:-1], sizes[-1] + head)

            assert slowest(blocks) == pytest.approx(slowest(cut))


def test_activations_after_korthikanti() -> None:
    """s b h (34 + 5 a s / h) without fused attention, s b h 34 without its core; 2 s b h under full recomputation."""
    shape = ModelShape(1, 6144, 64, 64, 4 * 6144, 51200, gated=False, tied=True)
    plan = Plan(zero=0, data=1, sequence_length=2048, micro_batch=4, fused_attention=False)
    sbh = 2048 * 4 * 6144
    assert block_activations(shape, plan, "none") == pytest.approx(sbh * (34 + 5 * 64 * 2048 / 6144), rel=0.03)
    assert block_activations(shape, plan, "selective") == pytest.approx(34 * sbh, rel=0.08)
    assert block_activations(shape, plan, "full") == 2 * sbh
    parallel = dataclasses.replace(plan, tensor=8, sequence_parallel=True)
    assert block_activations(shape, parallel, "none") == pytest.approx(block_activations(shape, plan, "none") / 8)


def test_the_pipelines_idle_time_is_the_published_fraction() -> None:
    """(p - 1) / (v m) of the time of the blocks (Narayanan et al. 2021), where the stages are alike."""
    free = dataclasses.replace(H100, network_bandwidth=1e18, node_bandwidth=1e18)
    still = dataclasses.replace(DEFAULT, latency_s=0.0, straggle=0.0)
    shape = dataclasses.replace(SHAPE, vocab_size=1)
    for interleave in (1, 4):
        plan = Plan(zero=0, data=1, pipeline=8, interleave=interleave, micro_batches=24)
        step = step_time(shape, plan, free, still)
        work = step.products + step.attention + step.elementwise
        assert step.pipeline / work == pytest.approx(7 / (interleave * 24), rel=1e-2)


def test_a_large_product_reaches_its_share() -> None:
    costs = Costs(SHAPE, PLAN, H100, DEFAULT)
    n = 32768
    reached = 2 * n**3 / costs.product(n, n, n) / (H100.tflops * 1e12)
    assert 0.97 * H100.product < reached < H100.product
    thin = 2 * n * n * 64 / costs.product(n, n, 64) / (H100.tflops * 1e12)
    assert thin < 0.5 * H100.product


def test_collectives_go_as_fast_as_their_slowest_link() -> None:
    costs = Costs(SHAPE, PLAN, H100, DEFAULT)
    inside, across = costs.bandwidth(8, 1), costs.bandwidth(64, 1)
    assert inside == H100.node_bandwidth * DEFAULT.link_share
    assert across == min(inside, 8 * H100.network_bandwidth * DEFAULT.network_share)
    assert costs.bandwidth(8, 8) == H100.network_bandwidth * DEFAULT.network_share  # one of each node
    assert costs.gather(1e9, 1, 1) == 0


@given(
    zero=st.sampled_from([0, 1, 3]),
    tensor=st.sampled_from([1, 2, 8]),
    pipeline=st.sampled_from([1, 4]),
    context=st.sampled_from([1, 2]),
    micro_batch=st.sampled_from([1, 4]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    device=st.sampled_from(sorted(DEVICES)),
)
def test_better_hardware_is_never_slower_and_more_ranks_never_hold_more(
    zero: int, tensor: int, pipeline: int, context: int, micro_batch: int, recompute: str, device: str
) -> None:
    plan = Plan(
        zero=zero,
        data=8,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        micro_batch=micro_batch,
        micro_batches=8,
        recompute=recompute,  # type: ignore[arg-type]
    )
    here = DEVICES[device]
    base = step_time(SHAPE, plan, here).total
    for name in ("tflops", "bandwidth", "node_bandwidth", "network_bandwidth"):
        better = dataclasses.replace(here, **{name: 2 * getattr(here, name)})
        assert step_time(SHAPE, plan, better).total <= base * (1 + 1e-9)
    wider = dataclasses.replace(plan, data=16)
    assert memory(SHAPE, wider).total <= memory(SHAPE, plan).total * (1 + 1e-9)
    kept = [memory(SHAPE, dataclasses.replace(plan, recompute=r)).activations for r in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)


def test_every_device_has_a_source_and_sane_figures() -> None:
    for device in DEVICES.values():
        assert any(character.isdigit() for character in device.source)
        assert 10 < device.tflops < 1e4
        assert device.tflops_8bit is None or device.tflops_8bit == pytest.approx(2 * device.tflops, rel=0.05)
        assert 16 <= device.memory_gib <= 512
        assert device.network_bandwidth <= device.node_bandwidth < device.bandwidth
        assert 0.3 <= device.product <= 0.95
    assert GIB == 1 << 30
