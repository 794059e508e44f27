"""The LSTM and Hugging Face's causal, masked and encoder-decoder models: sharded against unsharded, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trainwright as tw
from ranks import run_ranks
from small import batches, plain_loop, relative, share, three_calls, with_values
from trainwright.verification.cases import MODELS
from trainwright.verification.lift import Float64

STEPS = 20
CONFIG = {"precision": "fp64", "gradient_clipping": 1.0, "optimizer": {"lr": 1e-2}}
KINDS = ("lstm", "llama", "gpt2", "bert", "t5")


def _train(rank: int, world_size: int, kind: str, stage: int, accumulation: int) -> Any:
    config = CONFIG | {"zero": stage, "batch": {"accumulation": accumulation}}
    engine = tw.initialize(model=MODELS[kind], config=config)
    losses, norms = [], []
    with Float64():
        for tokens, labels in batches(STEPS):
            three_calls(engine, share(tokens, rank, world_size), share(labels, rank, world_size))
            losses.append(engine.last_step.loss)
            norms.append(engine.grad_norm)
    state = engine.full_state_dict()
    engine.close()
    return losses, norms, state


def _train_all(rank: int, world_size: int, cases: list[Any]) -> list[Any]:
    return [_train(rank, world_size, *case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_other_models_train_what_one_unsharded_process_does(world_size: int) -> None:
    pytest.importorskip("transformers")
    cases = [(kind, 3, 1) for kind in KINDS]
    if world_size == 2:  # the lower stages by turns; every model at every stage: verify's matrix
        cases += [(kind, index % 3, 3) for index, kind in enumerate(KINDS)]
    results = run_ranks(_train_all, world_size, world_size, cases)[0]
    expected = {}
    for kind in KINDS:
        model = with_values(MODELS[kind]).double()
        with Float64():
            expected[kind] = plain_loop(model, batches(STEPS))
    for case, (losses, norms, state) in zip(cases, results, strict=True):
        reference = expected[case[0]]
        worst = max(relative(a, b) for a, b in zip(losses, reference[0], strict=True))
        assert worst < 1e-9, f"{case}: loss {worst:.2g}"
        assert relative(norms[0], reference[1][0]) < 1e-6, case
        for name, tensor in state.items():
            whole = reference[2][name].double()
            error = ((tensor.double() - whole).norm() / whole.norm().clamp(min=1e-4)).item()  # some have no gradient at all
            assert error < 1e-8, f"{case}: {name} {error:.2g}"


def test_a_batch_with_shifted_labels_is_not_shifted_again() -> None:
    """A user's own Hugging Face causal model fed by our loader: its own loss would shift the labels a second time."""
    pytest.importorskip("transformers")
    from trainwright.data.batch import Batch

    tokens, labels = batches(1)[0]
    model = with_values(MODELS["llama"])
    logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    engine = tw.initialize(model=model, config={})
    batch = Batch(tokens, labels, None, torch.arange(len(tokens)), 0)
    assert engine.train_batch(batch) == pytest.approx(expected, rel=1e-6)
    engine.close()
