"""Optimizers by name and from the user's hands, on one process; groups, refusals, state."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright.config.schema import OptimizerConfig, ParameterGroup
from trainwright.errors import CheckpointError, ConfigError, ModelError, TrainwrightError, UsageError
from trainwright.optim import offload
from trainwright.optim.build import build_optimizer, state_bytes, use_optimizer
from trainwright.optim.catalogue import ELEMENTWISE
from trainwright.optim.ema import WeightAverage
from trainwright.optim.handle import OptimizerHandle
from trainwright.optim.lion import Lion


class Net(nn.Module):
    """An embedding, two hidden matrices, a norm, a head tied to the embedding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 5), generator=generator)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()


def train(model: nn.Module, handle: OptimizerHandle, steps: range) -> None:
    for step in steps:
        backward(model, step)
        handle.step()
        handle.zero_grad()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def config_of(name: str, **values: Any) -> OptimizerConfig:
    values.setdefault("weight_decay", 0.0 if name.endswith("Rprop") else 0.1)
    return OptimizerConfig(name=name, lr=values.pop("lr", 1e-2), **values)


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


def test_an_adopted_instance_keeps_groups_and_scheduler() -> None:
    model, reference = Net(), Net()
    optimizers, schedulers = [], []
    for net in (model, reference):
        matrices = [p for p in net.parameters() if p.ndim == 2]
        vectors = [p for p in net.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW([{"params": matrices, "lr": 1e-2}, {"params": vectors, "weight_decay": 0.0}])
        optimizers.append(optimizer)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)))
    names = {id(p): name for name, p in named(model)}
    handle = use_optimizer(optimizers[0], names, named(model))
    assert handle.optimizer is optimizers[0]
    for step in range(4):
        backward(model, step)
        handle.step()
        handle.zero_grad()
        schedulers[0].step()
        backward(reference, step)
        optimizers[1].step()
        optimizers[1].zero_grad()
        schedulers[1].step()
    assert same(model, reference)
    assert handle.peak_lr == 1e-2
    assert handle.lr == pytest.approx(1e-2 / 5)


def test_adagrad_is_adopted_with_its_starting_value() -> None:
    model, reference = Net(), Net()
    handle, plain = (
        use_optimizer(
            torch.optim.Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.3),
            {id(p): n for n, p in named(m)},
            named(m),
        )
        for m in (model, Net())
    )
    optimizer = torch.optim.Adagrad(reference.parameters(), lr=0.1, initial_accumulator_value=0.3)
    train(model, handle, range(3))
    for step in range(3):
        backward(reference, step)
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, reference)
    assert plain.state().keys() == handle.state().keys()


def test_instances_that_cannot_be_adopted() -> None:
    model = Net()
    names = {id(p): name for name, p in named(model)}
    stepped = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model, 0)
    stepped.step()
    cases: list[tuple[Any, type[TrainwrightError], str]] = [
        (stepped, UsageError, "state already"),
        (torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1), ModelError, "not the model's"),
        (torch.optim.Adafactor(model.parameters()), ConfigError, "whole matrices"),
        (lambda params: None, UsageError, "NoneType"),
        (lambda params: torch.optim.SGD(model.parameters(), lr=0.1), UsageError, "was not given"),
    ]
    for optimizer, error, words in cases:
        fresh = Net() if error is UsageError and words == "was not given" else model
        with pytest.raises(error, match=words):
            use_optimizer(optimizer, names, [(n, nn.Parameter(p.detach().clone())) for n, p in named(fresh)])


def test_a_callable_gets_the_parameters() -> None:
    model = Net()
    handle = use_optimizer(lambda params: torch.optim.RMSprop(params, lr=0.01), {}, named(model))
    start = copy.deepcopy(model)
    train(model, handle, range(2))
    assert not same(model, start)
    assert isinstance(handle.optimizer, torch.optim.RMSprop)


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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_offload_is_bitwise_the_plain_path(name: str) -> None:
    model, other = Net(), Net()
    plain = build_optimizer(named(model), config_of(name))
    offloaded = build_optimizer(named(other), config_of(name), offload=True, force_offload=True)
    assert isinstance(offloaded, offload.OffloadedHandle)
    assert all(s.local.data_ptr() != s.parameter.data_ptr() for s in offloaded.parameters)
    train(model, plain, range(4))
    train(other, offloaded, range(4))
    assert same(model, other)
    other.load_state_dict(Net(seed=3).state_dict())
    model.load_state_dict(Net(seed=3).state_dict())
    offloaded.reload_parameters()
    train(model, plain, range(4, 6))
    train(other, offloaded, range(4, 6))
    assert same(model, other)
    other.load_state_dict(Net(seed=4).state_dict())
    model.load_state_dict(Net(seed=4).state_dict())
    offloaded.load_state(offloaded.state())  # a resume: weights, then state
    train(model, plain, range(6, 7))
    train(other, offloaded, range(6, 7))
    assert same(model, other)


def test_offload_on_a_cpu_says_once_that_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_warned", False)
    with pytest.warns(UserWarning, match="already in host memory"):
        handle = build_optimizer(named(Net()), config_of("adamw"), offload=True)
    assert type(handle) is OptimizerHandle
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(named(Net()), config_of("adamw"), offload=True)


def test_weight_average_follows_swaps_and_resumes() -> None:
    model = Net()
    handle = build_optimizer(named(model), config_of("adamw"))
    average = WeightAverage(handle.parameters, 0.9)
    expected = {shard.name: shard.parameter.detach().clone() for shard in handle.parameters}
    for step in range(20):
        train(model, handle, range(step, step + 1))
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        for shard in handle.parameters:
            expected[shard.name] = decay * expected[shard.name] + (1 - decay) * shard.parameter.detach()
    before = copy.deepcopy(model)

    def evaluate_and_fail() -> None:
        with average.swap():
            for shard in handle.parameters:
                torch.testing.assert_close(shard.parameter.detach(), expected[shard.name])
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        evaluate_and_fail()
    assert same(model, before)
    other = WeightAverage(build_optimizer(named(Net()), config_of("adamw")).parameters, 0.9)
    other.load_state(average.state(), average.updates)
    assert other.updates == 20
    assert all(torch.equal(other.state()[key], value) for key, value in average.state().items())
    with pytest.raises(CheckpointError, match=r"up\.weight"):
        other.load_state({k: v for k, v in average.state().items() if k != "up.weight"}, 1)
