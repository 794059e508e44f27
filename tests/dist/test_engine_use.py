"""The engine's calls: right ones in any habit, wrong ones answered, fp16's scale, skipped steps, several engines."""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import Awkward, batches, mean_loss, plain_loop, relative, share, transformer, with_values
from torch import Tensor, nn

import trainwright as tw
from trainwright.errors import ConfigError, ModelError, NumericsError, UsageError

X, Y = batches(1)[0]


def _engine(**config: Any) -> Any:
    return tw.initialize(model=transformer, config=config)


def test_wrong_orders_of_calls_say_what_is_wrong() -> None:
    engine = _engine(batch={"accumulation": 2})
    with pytest.raises(UsageError, match=r"step\(\) without a backward"):
        engine.step()
    with pytest.raises(UsageError, match="does not come from engine"):
        engine.backward(torch.zeros(1, requires_grad=True).sum())
    with pytest.raises(UsageError, match="one number"):
        engine.backward(engine(X, return_logits=True).logits)
    loss = mean_loss(engine(X, labels=Y))
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match="second backward through the same forward"):
        loss.backward()
    assert engine.step() is None
    with pytest.raises(UsageError, match=r"step\(\) without a backward"):
        engine.step()
    with pytest.raises(UsageError, match="inside an accumulation"):
        engine.save("nowhere")
    with pytest.raises(UsageError, match="inside an accumulation"):
        engine.train_batch({"input_ids": X, "labels": Y})
    with pytest.warns(UserWarning, match="does nothing"):
        engine.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.zero_grad()  # said once
    engine.close()
    with pytest.raises(UsageError, match=r"after close\(\)"):
        engine(X)


def test_batches_that_cannot_be_cut_are_refused() -> None:
    engine = _engine(batch={"accumulation": 5})
    with pytest.raises(UsageError, match="3 rows for 5 micro-batches"):
        engine.train_batch({"input_ids": X[:3], "labels": Y[:3]})
    engine.close()


@dataclass
class Output:
    loss: Tensor
    extra: str = "kept"


Pair = namedtuple("Pair", ["loss", "logits"])


class Shapes(nn.Module):
    """Returns its loss in the form it is told to."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Any:
        loss = self.layer(x).square().mean()
        return {
            "tensor": loss, "tuple": (loss, x), "dict": {"loss": loss}, "named": Pair(loss, x),
        }[self.form]  # fmt: skip


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "named"])
def test_any_form_of_output_trains(form: str) -> None:
    torch.manual_seed(0)
    model = Shapes(form)
    before = model.layer.weight.detach().clone()
    engine = tw.initialize(model=model, config={"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}})
    x = torch.randn(6, 4)
    output = engine(x)
    loss = {"tensor": lambda o: o, "tuple": lambda o: o[0], "dict": lambda o: o["loss"], "named": lambda o: o.loss}[form](output)
    engine.backward(loss)
    engine.step()
    reference = Shapes("tensor")
    reference.layer.load_state_dict({"weight": before, "bias": torch.zeros(1)})
    with torch.no_grad():
        reference.layer.bias.copy_(model.layer.bias * 0)
    assert engine.last_step.loss == pytest.approx(float(loss.detach()))
    value = engine.train_batch({"x": x})
    assert value < float(loss.detach())
    engine.close()


def test_one_loss_over_two_forwards_is_one_micro_batch() -> None:
    """Preference losses compare two forwards of one model."""
    engine = _engine(precision="fp64", optimizer={"name": "sgd", "lr": 1.0, "weight_decay": 0.0})
    a, b = (X[:4], Y[:4]), (X[4:], Y[4:])
    loss = torch.nn.functional.softplus(mean_loss(engine(a[0], labels=a[1])) - mean_loss(engine(b[0], labels=b[1])))
    engine.backward(loss)
    engine.step()
    found = engine.full_state_dict()
    engine.close()
    model = with_values(transformer).double()
    torch.nn.functional.softplus(mean_loss(model(a[0], labels=a[1])) - mean_loss(model(b[0], labels=b[1]))).backward()
    for name, p in model.named_parameters():
        assert (found[name] - (p - p.grad)).abs().max() < 1e-12, name


def test_fp16_scale_static_and_dynamic_and_the_limit_of_skipped_steps() -> None:
    engine = _engine(precision={"dtype": "fp16", "loss_scale": 1024})
    engine.train_batch({"input_ids": X, "labels": Y})
    assert engine.loss_scale == 1024
    assert not engine.last_step.skipped
    engine.close()
    engine = _engine(precision={"dtype": "fp16", "loss_scale": {"initial": 2.0**40, "hysteresis": 1}})
    before = engine.full_state_dict()
    engine.train_batch({"input_ids": X, "labels": Y})
    assert engine.last_step.skipped
    assert engine.skipped_steps == 1
    assert engine.loss_scale == 2.0**39
    assert all(torch.equal(t, before[name]) for name, t in engine.full_state_dict().items())
    engine.close()

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Linear(4, 4)
            self.bad = nn.Linear(4, 4)
            self.after = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.good(x)
            return self.after(self.bad(hidden * float("inf"))).mean()

    engine = tw.initialize(model=Broken(), config={"precision": {"dtype": "fp32", "max_skipped_steps": 3}})
    for _ in range(2):
        engine.train_batch({"x": torch.ones(2, 4)})
    with pytest.raises(NumericsError, match=r"3 steps in a row skipped.*module bad"):
        engine.train_batch({"x": torch.ones(2, 4)})
    engine.close()


def test_users_own_optimizer_and_schedule() -> None:
    model = with_values(transformer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    reference = with_values(transformer).double()
    expected = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    engine = tw.initialize(model=model, config={"precision": "fp64"}, optimizer=optimizer, lr_schedule=schedule)
    assert engine.optimizer is optimizer
    for step, (tokens, labels) in enumerate(batches(4)):
        for group in expected.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        mean_loss(reference(tokens, labels=labels)).backward()
        expected.step()
        expected.zero_grad()
        engine.backward(mean_loss(engine(tokens, labels=labels)))
        engine.step()
    state = engine.full_state_dict()
    engine.close()
    for name, tensor in reference.state_dict().items():
        assert (state[name] - tensor).abs().max() < 1e-10, name
    with pytest.raises(ConfigError, match="one of them decides|optimizer in the config"):
        tw.initialize(model=transformer, config={"optimizer": {"lr": 1.0}}, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))


def test_models_that_cannot_be_taken_are_refused() -> None:
    with pytest.raises(ModelError, match="no parameter to train"):
        tw.initialize(model=nn.Identity())
    with pytest.raises(ModelError, match="matches no module"):
        tw.initialize(model=Awkward(), shard_units=["Missing"])
    with pytest.raises(ConfigError, match="matches no parameter"):
        tw.initialize(model=Awkward(), config={"freeze": ["nothing.*"]})
    with pytest.raises(ConfigError, match="tensor_plan"):
        tw.initialize(model=Awkward(), tensor_plan={"head": "colwise"})
    with torch.device("meta"):
        bare = Awkward()
    with pytest.raises(ModelError, match="built by a callable"):
        tw.initialize(model=bare)


def test_recompute_does_not_change_the_run() -> None:
    expected, _, _ = plain_loop(with_values(lambda: transformer(dropout=0.0)), batches(3), clip=None)
    for changes in ({"recompute": "full"}, {"recompute": "full", "zero": 3}):
        engine = _engine(optimizer={"lr": 1e-2}, **changes)
        found = [engine.train_batch({"input_ids": x, "labels": y}) for x, y in batches(3)]
        engine.close()
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)), changes


def _skipping(rank: int, world_size: int) -> dict[str, Any]:
    """A block unused in the last micro-batch, in every stage, on hybrid meshes too; overflow on one rank alone."""
    found: dict[str, Any] = {}
    for stage, replicate in ((0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)):
        config = {"zero": stage, "parallel": {"replicate": replicate}, "batch": {"accumulation": 2}, "precision": "fp64",
                  "optimizer": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0}}  # fmt: skip
        engine = tw.initialize(model=Awkward, config=config)
        for half in range(2):
            x, y = share(X, rank, world_size), share(Y, rank, world_size)
            rows = slice(half * len(x) // 2, (half + 1) * len(x) // 2)
            mean_loss(engine(x[rows], labels=y[rows], skip=half == 1)).backward()
        engine.step()
        found[f"stage {stage}, {replicate} copies"] = engine.full_state_dict()
        engine.close()
    engine = tw.initialize(model=transformer, config={"zero": 2, "precision": {"dtype": "fp16", "loss_scale": {"initial": 2.0**14}}})
    x, y = share(X, rank, world_size), share(Y, rank, world_size)
    loss = mean_loss(engine(x, labels=y))
    engine.backward(loss * (1e30 if rank == 1 else 1.0))
    engine.step()
    found["skipped together"] = (engine.last_step.skipped, engine.loss_scale, engine.skipped_steps)
    engine.close()
    teacher = tw.initialize(model=transformer, config={"zero": 3})
    student = tw.initialize(model=Awkward, config={"zero": 1})
    with torch.no_grad():
        teacher.eval()(x, return_logits=True)
    found["two engines"] = student.train_batch({"input_ids": x, "labels": y})
    teacher.close()
    student.close()
    return found


def test_unused_units_and_agreed_skips_on_four_ranks() -> None:
    results = run_ranks(_skipping, 4, 4)
    model = with_values(Awkward).double()
    per_rank = [(share(X, rank, 4), share(Y, rank, 4)) for rank in range(4)]
    total = 0
    for half in range(2):
        for x, y in per_rank:
            rows = slice(half * len(x) // 2, (half + 1) * len(x) // 2)
            count = int((y[rows] != -100).sum())
            total += count
            if count:
                (mean_loss(model(x[rows], labels=y[rows], skip=half == 1)) * count).backward()
    for key, state in results[0].items():
        if not key.startswith("stage"):
            continue
        for name, p in model.named_parameters():
            expected = p if p.grad is None else p - p.grad / total
            assert (state[name] - expected).abs().max() < 1e-12, f"{key}: {name}"
    for found in results:
        assert found["skipped together"] == (True, 2.0**14, 1)  # hysteresis 2: the first overflow is borne
        assert found["two engines"] == results[0]["two engines"]


def test_a_checkpoint_of_an_optimizer_without_state_loads(tmp_path: Path) -> None:
    for name in ("sgd", "adamw"):  # adamw has none before its first step
        engine = _engine(optimizer={"name": name, "lr": 0.1})
        engine.save(tmp_path / name, state={"note": name})
        engine.train_batch({"input_ids": X, "labels": Y})
        assert engine.load(tmp_path / name) == {"note": name}
        assert engine.global_step == 0
        engine.close()


def test_dropout_differs_between_micro_batches_and_repeats_in_a_replay() -> None:
    def losses() -> list[float]:
        engine = tw.initialize(model=lambda: transformer(dropout=0.5), config={"batch": {"accumulation": 2}})
        found = [float(mean_loss(engine(X[1:2], labels=Y[1:2])).detach()) for _ in range(2)]
        engine.close()
        return found

    first, second = losses()
    assert first != second
    assert losses() == [first, second]


def test_settings_that_cannot_act_are_refused_or_said() -> None:
    with pytest.raises(ConfigError, match="lr_schedule in the config"):
        tw.initialize(model=transformer, config={"lr_schedule": "constant"}, lr_schedule=lambda step: 1.0)
    with pytest.raises(ModelError, match="no unit was found"):
        tw.initialize(model=Shapes("tensor"), config={"recompute": "full"})
    with pytest.warns(UserWarning, match=r"evaluate\.every"):
        tw.initialize(model=Shapes("tensor"), config={"evaluate": {"every": 5}}).close()
    for pattern, message in (("blocks", "list of modules"), ("head", "tied"), ("nothing", "matches no module")):
        with pytest.raises(ModelError, match=message):
            tw.initialize(model=Awkward(), config={"precision": "bf16", "keep_fp32": [pattern]})


def test_modules_kept_in_fp32_train() -> None:
    engine = tw.initialize(model=transformer, config={"precision": "bf16", "keep_fp32": ["*norm*", "*attention*"]})
    first = engine.train_batch({"input_ids": X, "labels": Y})
    assert engine.train_batch({"input_ids": X, "labels": Y}) < first
    engine.close()
