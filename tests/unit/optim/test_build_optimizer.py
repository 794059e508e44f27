"""Optimizers by name, on one process; groups, refusals, state."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from optim_net import Net, backward, config_of, named, same, train
from torch import nn

from trainwright.config.schema import OptimizerConfig, ParameterGroup
from trainwright.errors import CheckpointError, ConfigError, ModelError
from trainwright.optim.build import build_optimizer, state_bytes, use_optimizer
from trainwright.optim.catalogue import ELEMENTWISE
from trainwright.optim.lion import Lion

ALL = ["adamw", "adam", "sgd", "lion", "muon", *(f"torch.optim.{name}" for name in ELEMENTWISE)]


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_optimizer_goes_on_bitwise(name: str) -> None:
    """state() and scalars(), through JSON, into a fresh handle: the same weights as without the interruption."""
    config = config_of(name, **({"momentum": 0.9, "nesterov": True} if name == "sgd" else {}))
    model = Net()
    handle = build_optimizer(named(model), config)
    train(model, handle, range(3))
    weights = copy.deepcopy(model.state_dict())
    tensors = {key: value.clone() for key, value in handle.state().items()}
    scalars = json.loads(json.dumps(handle.scalars()))
    train(model, handle, range(3, 6))

    again = Net(seed=5)
    again.load_state_dict(weights)
    handle = build_optimizer(named(again), config)
    before = copy.deepcopy(again.state_dict())
    handle.materialise_state()
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())
    assert handle.state().keys() == tensors.keys()
    handle.load_state(tensors)
    handle.load_scalars(scalars)
    train(again, handle, range(3, 6))
    assert same(model, again)


@pytest.mark.parametrize("name", ALL)
def test_materialising_alone_changes_nothing(name: str) -> None:
    model, other = Net(), Net()
    plain, materialised = (build_optimizer(named(m), config_of(name)) for m in (model, other))
    backward(other, 0)
    materialised.materialise_state()  # with gradients waiting
    backward(model, 0)
    assert all(p.grad is not None for p in other.parameters())
    plain.step()
    materialised.step()
    plain.zero_grad()
    materialised.zero_grad()
    train(model, plain, range(1, 3))
    train(other, materialised, range(1, 3))
    assert same(model, other)


def test_fused_adamw_equals_torch_and_moments_are_the_masters_format() -> None:
    model, reference = Net().double(), Net().double()
    handle = build_optimizer(named(model), config_of("adamw", decay_norms_and_biases=True))
    torch_optimizer = torch.optim.AdamW(reference.parameters(), 1e-2, (0.9, 0.95), 1e-8, 0.1, foreach=False)
    assert handle.optimizer.param_groups[0]["fused"]
    for step in range(5):
        backward(model, step)
        handle.step()
        handle.zero_grad()
        backward(reference, step)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all(v.dtype == torch.float64 for k, v in handle.state().items() if not k.endswith(".step"))
    elements = sum(p.numel() for p in model.parameters())
    assert state_bytes(handle) == 16 * elements + 4 * len(handle.parameters)


def test_lion_follows_its_paper() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    weights, momentum = parameter.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for grad in ([1.0, -1.0, 0.0], [-30.0, 0.5, 2.0]):
        parameter.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        weights = weights - 0.1 * (torch.sign(0.9 * momentum + 0.1 * parameter.grad) + 0.2 * weights)
        momentum = 0.5 * momentum + 0.5 * parameter.grad
    torch.testing.assert_close(parameter.detach(), weights, rtol=1e-14, atol=0)


def test_groups_by_pattern_and_no_decay_below_two_dimensions() -> None:
    model = Net()
    groups = (
        ParameterGroup(pattern="up.*", lr_scale=0.5),
        ParameterGroup(pattern="*.bias", weight_decay=0.3),  # up.bias is taken by the first
        ParameterGroup(pattern="embed*", lr_scale=0.1, weight_decay=0.0),
    )
    handle = build_optimizer(named(model), config_of("adamw", groups=groups))
    found = {}
    for group in handle.optimizer.param_groups:
        for shard in handle.parameters:
            if any(shard.local is p for p in group["params"]):
                found[shard.name] = (group["lr"], group["weight_decay"])
    assert found == {
        "embed.weight": (1e-3, 0.0),
        "up.weight": (5e-3, 0.1),
        "up.bias": (5e-3, 0.0),
        "down.weight": (1e-2, 0.1),
        "norm.weight": (1e-2, 0.0),
        "norm.bias": (1e-2, 0.3),
    }, "and the tied head is the embedding"
    handle.set_lr(2e-2)
    assert handle.lr == 2e-2
    assert {g["lr"] for g in handle.optimizer.param_groups} == {2e-3, 1e-2, 2e-2}


def test_muon_splits_the_parameters_and_the_rates() -> None:
    model = Net()
    handle = build_optimizer(named(model), config_of("muon", adamw_lr=4e-3))
    muon = {id(p) for g in handle.optimizer.param_groups if g["muon"] for p in g["params"]}
    assert {s.name for s in handle.parameters if id(s.local) in muon} == {"up.weight", "down.weight"}
    handle.set_lr_factor(0.5)
    assert {(g["muon"], g["lr"]) for g in handle.optimizer.param_groups} == {(True, 5e-3), (False, 2e-3)}
    keys = handle.state().keys() | (handle.materialise_state() or handle.state().keys())
    assert {"up.weight.momentum_buffer", "embed.weight.exp_avg_sq"} <= keys


REFUSED = [
    ({"name": "torch.optim.Muon"}, "muon"),
    ({"name": "Adafactor"}, "whole matrices"),
    ({"name": "torch.optim.LBFGS"}, "closure"),
    ({"name": "SparseAdam"}, "sparse"),
    ({"name": "shampoo"}, "whole matrices"),
    ({"name": "adamww"}, "'adamw'"),
    ({"name": "torch.optim.RMSProb"}, "torch.optim.RMSprop"),
    ({"name": "no_such_package.Adam"}, "not known"),
    ({"name": "collections.OrderedDict"}, "no optimizer"),
    ({"name": "adamw", "options": {"amsgrd": True}}, "amsgrad"),
    ({"name": "adamw", "options": {"lr": 1.0}}, "word of its own"),
    ({"name": "adamw", "momentum": 0.9}, "momentum"),
    ({"name": "sgd", "betas": (0.9, 0.95)}, "betas"),
    ({"name": "adamw", "adamw_lr": 1e-3}, "muon"),
    ({"name": "rprop", "weight_decay": 0.1}, "weight_decay"),
    ({"name": "sgd", "nesterov": True}, "momentum"),
    ({"name": "muon", "options": {"ns_steps": 9}}, "ns_steps"),
    ({"name": "muon", "options": {"ns_dtype": "int8"}}, "ns_dtype"),
    ({"name": "lion", "betas": (0.9, 1.0)}, "betas"),
    ({"groups": (ParameterGroup(pattern="nothing.*"),)}, "nothing"),
    ({"groups": (ParameterGroup(pattern="*"), ParameterGroup(pattern="up.*"))}, "up"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_what_cannot_act_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(named(Net()), OptimizerConfig(**values))
    assert words in str(caught.value)
    assert caught.value.rule
    assert caught.value.remedy


def test_models_without_a_place_for_the_optimizer_are_refused() -> None:
    model = Net().requires_grad_(False)
    with pytest.raises(ModelError, match="trainable"):
        build_optimizer(named(model), config_of("adamw"))
    with pytest.raises(ModelError, match="hidden matrix"):
        build_optimizer(nn.Linear(1, 4).named_parameters(), config_of("muon"))


def test_loading_another_optimizers_state_is_refused() -> None:
    model = Net()
    adamw = build_optimizer(named(model), config_of("adamw"))
    adamw.materialise_state()
    own = use_optimizer(lambda params: torch.optim.SGD(params, lr=0.1), {}, named(Net()))
    with pytest.raises(CheckpointError, match="SGD has 1"):
        own.load_scalars(adamw.scalars())
    state = adamw.state()
    with pytest.raises(CheckpointError, match="exp_avg_sq"):
        adamw.load_state({key: value for key, value in state.items() if not key.endswith("exp_avg_sq")})
    state["up.weight.exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="shape"):
        adamw.load_state(state)


def test_a_parameter_that_never_had_a_gradient_starts_afresh_after_loading() -> None:
    model = Net()
    handle = build_optimizer(named(model), config_of("adamw"))
    backward(model, 0)
    model.up.bias.grad = None
    handle.step()
    saved = handle.state()
    assert "up.bias.step" not in saved
    other = build_optimizer(named(Net()), config_of("adamw"))
    other.materialise_state()
    other.load_state(saved)
    assert other.state().keys() == saved.keys()
