"""Steps whose forwards and backwards are captured and replayed, against the same steps run as they are: bit for bit the same.

On a CPU a tape stands in for the CUDA graph: it records operators with the memory that they read and write, and plays them
again there, without Python. Real graphs: tests/gpu.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import VOCAB, Awkward, batches, transformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainwright as tw
from trainwright.data.batch import Batch
from trainwright.errors import ContradictionError
from trainwright.other_machines import as_on_any_machine
from trainwright.parallel.captured import WARM_UP, CapturedStep

STEPS = WARM_UP + 4


class Tape(TorchDispatchMode):
    """Records operators, and does them again in the memory of the first time."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = list(module.parameters())
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def rehearse(self, work: Callable[[], Any]) -> tuple[Any, str]:
        with (reads := Reading()):
            found = work()
        return found, "the host waits" if reads.seen else ""

    def capture(self, work: Callable[[], Any]) -> Any:
        with self:
            found = work()
        results = [found.sum, found.count, found.masked, *(p.grad for p in self._parameters if p.grad is not None)]
        for tensor in results:  # a capture computes nothing
            tensor.detach().fill_(-7)
        return found

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class Reading(TorchDispatchMode):
    """Sees values read on the host."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Reads(nn.Module):
    """Looks at a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.table(input_ids)
        if logits.abs().max().item() > 1e9:
            raise AssertionError("not here")
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Drops(Awkward):
    """With dropout from torch's generators."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, skip: bool = False) -> dict[str, Tensor]:
        self.blocks[1].register_forward_hook(lambda _m, _i, out: nn.functional.dropout(out, 0.1), always_call=False)
        found = super().forward(input_ids, labels)
        self.blocks[1]._forward_hooks.clear()
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: transformer(dropout=0.1),
    "awkward": Awkward,
    "reads": Reads,
    "drops": Drops,
    "ours_draws": lambda: _with_drops(),
}


def _with_drops() -> nn.Module:
    """Ours, with a dropout of torch's that somebody has added to a block."""
    model = transformer()
    model.blocks[1].register_forward_hook(lambda _m, _i, out: nn.functional.dropout(out, 0.1))
    return model


class Run:
    """An engine, and the tapes that it recorded where it captures."""

    def __init__(self, model: str, captures: bool, **config: Any) -> None:
        given = {"gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}, "compile": False} | config
        self.engine = tw.initialize(model=MODELS[model], config=given)
        self.tapes: list[Tape] = []
        if captures:
            parts = self.engine.parts
            parts.randomness.watches = True
            step = CapturedStep(
                parts.model.module,
                parts.mesh.device,
                parts.model.end_step,
                lambda: "it draws" if parts.randomness.drawn else "",
                self._tape,
            )
            self.engine.parts = dataclasses.replace(parts, captured=step)

    def _tape(self) -> Tape:
        self.tapes.append(Tape(self.engine.module))
        return self.tapes[-1]

    @property
    def replays(self) -> list[int]:
        """Of each recording that was used."""
        return [tape.replays for tape in self.tapes if tape.replays]

    def step(self, batch: Any) -> float:
        with as_on_any_machine():  # nothing on the host that a GPU's step would not do
            return self.engine.train_batch(batch)

    def weights(self) -> dict[str, Tensor]:
        return self.engine.full_state_dict()


def _same(a: Run, b: Run) -> None:
    for name, tensor in a.weights().items():
        assert torch.equal(tensor, b.weights()[name]), name


def _dicts(steps: int, **how: Any) -> list[dict[str, Tensor]]:
    return [{"input_ids": x, "labels": y} for x, y in batches(steps, **how)]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {"precision": "fp32"}),
    ("transformer", {"precision": "bf16", "batch": {"accumulation": 3}}),
    ("transformer", {"precision": {"dtype": "fp16", "loss_scale": {"initial": 2.0**40}}}),
    ("transformer", {"precision": "bf16", "recompute": "full", "keep_fp32": ["norm"]}),
    ("transformer", {"precision": "fp32", "recompute": "selective", "batch": {"accumulation": 2}}),
    ("transformer", {"precision": "bf16", "freeze": ["embedding.*"], "ema": 0.9}),
    ("awkward", {"precision": "fp64", "batch": {"accumulation": 2}, "zero": 2}),
    ("awkward", {"precision": "bf16"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[1].values()))}"[:60])
def test_replayed_steps_are_the_steps_themselves(case: tuple[str, dict[str, Any]]) -> None:
    plain, captured = (Run(case[0], captures, **case[1]) for captures in (False, True))
    for number, batch in enumerate(_dicts(STEPS)):
        assert captured.step(batch) == plain.step(batch), number
        assert str(captured.engine.last_step) == str(plain.engine.last_step)  # a NaN norm is equal to none
        if number == 1:  # copies of the parameters that are up to date when the capture comes
            for run in (plain, captured):
                with torch.no_grad():
                    run.engine(batch["input_ids"])
    _same(plain, captured)
    assert captured.replays == [STEPS - WARM_UP]


def test_dropout_follows_the_samples_of_each_replay() -> None:
    plain, captured = (Run("transformer", captures) for captures in (False, True))
    for number, (x, y) in enumerate(batches(STEPS)):
        batch = Batch(x, y, None, torch.arange(len(x)) + 100 * number, 100 * number)
        assert captured.step(batch) == plain.step(batch)
    _same(plain, captured)
    assert captured.replays == [STEPS - WARM_UP]


def test_a_loaded_checkpoint_is_what_replays_go_on_from(tmp_path: Path) -> None:
    plain, captured = (Run("transformer", captures, precision="bf16") for captures in (False, True))
    data = _dicts(STEPS + 3)
    for run in (plain, captured):
        for batch in data[:STEPS]:
            run.step(batch)
            if run.engine.global_step == 2:
                run.engine.save(tmp_path / str(id(run)))
        run.engine.load(tmp_path / str(id(run)))
    assert [captured.step(b) for b in data[STEPS:]] == [plain.step(b) for b in data[STEPS:]]
    _same(plain, captured)


def test_parameters_that_moved_are_captured_anew() -> None:
    plain, captured = (Run("transformer", captures) for captures in (False, True))
    data = _dicts(STEPS + WARM_UP + 2)
    for number, batch in enumerate(data):
        if number == STEPS:
            for run in (plain, captured):
                run.engine.module.eval()  # no dropout from here on
        assert captured.step(batch) == plain.step(batch)
    assert captured.replays == [STEPS - WARM_UP, 2]


def test_tables_that_a_longer_sequence_replaces_are_not_read_any_more() -> None:
    plain, captured = (Run("transformer", captures) for captures in (False, True))
    for number, batch in enumerate(_dicts(STEPS + WARM_UP + 2)):
        if number == STEPS:
            for run in (plain, captured):
                run.engine.evaluate(_dicts(1, length=80))
        assert captured.step(batch) == plain.step(batch)
    assert captured.replays == [STEPS - WARM_UP, 2]


def test_lengths_that_come_by_turns_are_warm_before_one_is_captured() -> None:
    plain, captured = (Run("transformer", captures) for captures in (False, True))
    data = [batch for pair in zip(_dicts(6), _dicts(6, length=5), strict=True) for batch in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in data:
            assert captured.step(batch) == plain.step(batch)
    _same(plain, captured)
    assert captured.replays == [3]


def test_closing_frees_what_is_captured() -> None:
    run = Run("transformer", True)
    for batch in _dicts(STEPS):
        run.step(batch)
    alive = [weakref.ref(tape) for tape in run.tapes]
    assert run.replays
    run.tapes.clear()
    run.engine.close()
    gc.collect()
    assert not any(tape() for tape in alive)


def test_other_shapes_run_as_they_are_and_say_so_once() -> None:
    plain, captured = (Run("transformer", captures) for captures in (False, True))
    data = _dicts(STEPS)
    data[-3:-1] = _dicts(2, length=5, seed=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in data:
            assert captured.step(batch) == plain.step(batch)
    assert len([w for w in said if "fused.cuda_graphs: a step whose tensors have other shapes" in str(w.message)]) == 1
    _same(plain, captured)
    assert captured.replays == [2]


@pytest.mark.parametrize(("model", "reason"), [("reads", "the host waits"), ("drops", "it draws"), ("ours_draws", "it draws")])
def test_what_cannot_be_captured_runs_as_it_is(model: str, reason: str) -> None:
    plain, captured = (Run(model, captures) for captures in (False, True))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in _dicts(STEPS):
            losses = []
            for run in (plain, captured):
                torch.manual_seed(run.engine.global_step)
                losses.append(run.step(batch))
            assert losses[0] == losses[1]
    assert len([w for w in said if "fused.cuda_graphs: steps run without a graph" in str(w.message)]) == 1
    assert any(reason in str(w.message) for w in said)
    _same(plain, captured)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "on a CPU"),
        ({"zero": 3}, "zero.stage=3 with fused.cuda_graphs"),
        ({"fused": {"cuda_graphs": True, "optimizer_in_backward": True}}, "optimizer_in_backward=true with fused.cuda_graphs"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor=2 with fused.cuda_graphs"),
    ],
)
def test_refused_before_anything_starts(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ContradictionError) as caught:
        tw.initialize(model=transformer, config={"fused": {"cuda_graphs": True}} | config)
    assert words in str(caught.value)
    assert "fused.cuda_graphs=false" in str(caught.value)
