"""The user's own optimizers, offload, and averaged weights, on one process."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from optim_net import Net, backward, config_of, named, same, train
from torch import nn

from trainwright.errors import CheckpointError, ConfigError, ModelError, TrainwrightError, UsageError
from trainwright.optim import offload
from trainwright.optim.build import build_optimizer, use_optimizer
from trainwright.optim.ema import WeightAverage
from trainwright.optim.handle import OptimizerHandle


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
    offloaded.weights_loaded()
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
