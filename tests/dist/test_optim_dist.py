"""Optimizers on shards against the same on one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ranks import run_ranks
from trainwright.config.schema import OptimizerConfig, ParameterGroup
from trainwright.errors import ModelError
from trainwright.optim import whole_matrices
from trainwright.optim.build import build_optimizer, use_optimizer
from trainwright.optim.catalogue import ELEMENTWISE
from trainwright.optim.ema import WeightAverage
from trainwright.optim.groups import local_tensor
from trainwright.optim.handle import OptimizerHandle
from trainwright.optim.muon import hidden_matrices
from trainwright.optim.schedules import drive_lr

STEPS = 3
ELEMENTWISE_CASES = [
    ("adamw", {}),
    ("adamw", {"options": {"amsgrad": True}}),
    ("adam", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("lion", {}),
    *((f"torch.optim.{name}", {"weight_decay": 0.0} if name == "Rprop" else {}) for name in ELEMENTWISE),
]
FP64 = {"options": {"ns_dtype": "fp64"}}


class Net(nn.Module):
    """Matrices of which some have fewer rows than there are ranks, or a number that does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.up = nn.Linear(6, 10)
        self.same = nn.Linear(10, 10, bias=False)
        self.narrow = nn.Linear(10, 2)
        self.wide = nn.Linear(2, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.same(torch.tanh(self.up(self.embed(tokens)))))
        return self.head(self.norm(self.wide(torch.tanh(self.narrow(x)))))


def make_net() -> Net:
    torch.manual_seed(3)
    return Net().double()


def backward(model: nn.Module, seed: int) -> None:
    """Every rank has the same batch, so the mean of its gradients is each rank's: the reference needs no ranks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 13, (4, 5), generator=generator)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for unit in (model.up, model.same):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (model.up, model.same, model):
        # As parallel/zero.py does: sums, and here division by hand.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return model


def step(model: nn.Module, handle: OptimizerHandle, seed: int, world_size: int) -> None:
    backward(model, seed)
    for parameter in model.parameters():
        local_tensor(parameter.grad).div_(world_size)
    handle.step()
    handle.zero_grad()


def config_of(name: str, values: dict[str, Any]) -> OptimizerConfig:
    return OptimizerConfig(name=name, lr=1e-2, **values)


def difference(model: nn.Module, reference: nn.Module) -> float:
    """Largest difference of any parameter over all ranks. Collective."""
    worst = 0.0
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        whole = a.full_tensor() if isinstance(a, DTensor) else a
        worst = max(worst, float((whole - b).detach().abs().max()))
    return worst


def against_reference(mesh: DeviceMesh, name: str, values: dict[str, Any], **how: Any) -> float:
    """Difference to single-process training; halfway the state moves to a fresh handle through state()."""
    world_size = dist.get_world_size()
    config = config_of(name, values)
    reference, model = make_net(), shard(make_net(), mesh)
    expected = build_optimizer(reference.named_parameters(), config)
    handle = build_optimizer(model.named_parameters(), config, **how)
    for seed in range(STEPS):
        step(reference, expected, seed, 1)
        if seed == STEPS // 2:
            saved = {key: value.clone() for key, value in handle.state().items()}
            scalars = handle.scalars()
            handle = build_optimizer(model.named_parameters(), config, **how)
            handle.materialise_state()
            assert handle.state().keys() == saved.keys()
            handle.load_state(saved)
            handle.load_scalars(scalars)
        step(model, handle, seed, world_size)
    expected_state = expected.state()
    for key, value in handle.state().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert whole.shape == expected_state[key].shape, key
        torch.testing.assert_close(whole, expected_state[key], rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    return difference(model, reference)


def elementwise(mesh: DeviceMesh) -> dict[str, float]:
    results = {f"{name} {values}": against_reference(mesh, name, values) for name, values in ELEMENTWISE_CASES}
    results["adamw offloaded"] = against_reference(mesh, "adamw", {}, offload=True, force_offload=True)
    groups = (ParameterGroup(pattern="up.*", lr_scale=0.3, weight_decay=0.5),)
    results["groups"] = against_reference(mesh, "adamw", {"groups": groups})
    return results


def muon(meshes: dict[str, DeviceMesh]) -> dict[str, float]:
    results = {}
    limit = whole_matrices.BUCKET_ELEMENTS
    for name, mesh in meshes.items():
        for whole_matrices.BUCKET_ELEMENTS in (limit, 80):  # 80: several exchanges
            key = f"muon, {name}, buckets of {whole_matrices.BUCKET_ELEMENTS}"
            results[key] = against_reference(mesh, "muon", FP64)
    whole_matrices.BUCKET_ELEMENTS = limit
    return results


def on_four_ranks(rank: int) -> tuple[dict[str, float], dict[str, float]]:
    """Two copies of two shards; all sharded; all copies."""
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    meshes = {
        "hybrid": hybrid,
        "shard": init_device_mesh("cpu", (4,), mesh_dim_names=("shard",)),
        "replicate": init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard")),
    }
    whole = muon(meshes)
    return {**elementwise(hybrid), "replicas": replicas_apart_in_bf16(hybrid)}, whole


def replicas_apart_in_bf16(mesh: DeviceMesh) -> float:
    """Largest difference between the copies after steps whose iteration and exchange are in bf16: must be 0."""
    model, start = shard(make_net(), mesh), make_net()
    handle = build_optimizer(model.named_parameters(), config_of("muon", {"options": {"ns_dtype": "bf16"}}))
    for seed in range(STEPS):
        step(model, handle, seed, dist.get_world_size())
    assert difference(model, start) > 1e-3, "it trains"
    mine = torch.cat([local_tensor(p).flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, group_src=0, group=mesh.get_group("replicate"))
    return float((mine - first).abs().max())


def on_three_ranks(rank: int) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Rows that do not divide, and ranks without any."""
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("shard",))
    return elementwise(mesh), muon({"shard": mesh}), others(mesh)


def beyond(results: dict[str, float], tolerance: float) -> dict[str, float]:
    return {name: value for name, value in results.items() if not value <= tolerance}


def test_optimizers_on_hybrid_and_even_layouts_equal_one_process() -> None:
    for plain, whole in run_ranks(on_four_ranks, 4):
        assert not beyond(plain, 1e-12)
        assert not beyond(whole, 1e-10)


def test_optimizers_on_uneven_shards_equal_one_process() -> None:
    for plain, whole, rest in run_ranks(on_three_ranks, 3):
        assert not beyond(plain, 1e-12)
        assert not beyond(whole, 1e-10)
        assert rest.pop("hidden") == ["narrow.weight", "same.weight", "up.weight", "wide.weight"]
        assert not beyond(rest, 1e-12)


def others(mesh: DeviceMesh) -> dict[str, Any]:
    """Adopted instances, averages, values that come late, absent gradients, a state that cannot be resharded."""
    return {**adopted(mesh), **late_values(mesh), **absent_gradients(mesh)}


def adopted(mesh: DeviceMesh) -> dict[str, Any]:
    world_size = dist.get_world_size()
    results: dict[str, Any] = {}

    # The user's instance, built before sharding, with a scheduler tied to it.
    reference, model = make_net(), make_net()
    pairs = []
    for net in (reference, model):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        pairs.append((optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (s + 1))))
    old_to_name = {id(p): name for name, p in model.named_parameters()}
    shard(model, mesh)
    handle = use_optimizer(pairs[1][0], old_to_name, model.named_parameters())
    driver = drive_lr(pairs[1][1], handle)
    average = WeightAverage(handle.parameters, 0.9)
    plain = WeightAverage(build_optimizer(reference.named_parameters(), config_of("sgd", {})).parameters, 0.9)
    for seed in range(STEPS):
        driver.before_step(seed)
        step(model, handle, seed, world_size)
        driver.after_step()
        average.update()
        backward(reference, seed)
        pairs[0][0].step()
        pairs[0][0].zero_grad()
        pairs[0][1].step()
        plain.update()
    results["adopted"] = difference(model, reference)
    with average.swap(), plain.swap():
        results["average"] = difference(model, reference)
    results["average back"] = difference(model, reference)
    return results


def late_values(mesh: DeviceMesh) -> dict[str, Any]:
    world_size = dist.get_world_size()
    # Initialised on the meta device: FSDP moves uneven shards to padded storage at the first forward.
    with torch.device("meta"):
        late = Net().double()
    shard(late, mesh).to_empty(device="cpu")
    source = shard(make_net(), mesh)
    with torch.no_grad():
        for a, b in zip(late.parameters(), source.parameters(), strict=True):
            local_tensor(a).copy_(local_tensor(b))
    reference = make_net()
    late_handle = build_optimizer(late.named_parameters(), config_of("adamw", {}))
    expected = build_optimizer(reference.named_parameters(), config_of("adamw", {}))
    for seed in range(STEPS):
        step(late, late_handle, seed, world_size)
        step(reference, expected, seed, 1)
    return {"meta": difference(late, reference)}


def absent_gradients(mesh: DeviceMesh) -> dict[str, Any]:
    world_size = dist.get_world_size()
    results: dict[str, Any] = {}
    # Gradients that are absent on every rank.
    model, reference = shard(make_net(), mesh), make_net()
    handle = build_optimizer(model.named_parameters(), config_of("muon", FP64))
    expected = build_optimizer(reference.named_parameters(), config_of("muon", FP64))
    for net, own, ranks in ((model, handle, world_size), (reference, expected, 1)):
        backward(net, 0)
        for parameter in net.parameters():
            local_tensor(parameter.grad).div_(ranks)
        net.same.weight.grad = None
        net.embed.weight.grad = None
        own.step()
    results["unused"] = difference(model, reference)
    results["hidden"] = sorted(hidden_matrices(model))

    # A state that no other layout could load.
    class Factored(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["columns"] = parameter.new_zeros(99)

    odd = use_optimizer(lambda params: Factored(params, lr=0.1), {}, model.named_parameters())
    odd.step()
    with pytest.raises(ModelError, match="columns"):
        odd.state()
    return results
