"""Newton-Schulz, the choice of hidden matrices, and the division of matrices over ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainwright.errors import ConfigError
from trainwright.optim.muon import (
    COEFFICIENTS,
    UPDATE_RMS,
    Muon,
    default_ns_dtype,
    hidden_matrices,
    is_hidden_matrix,
    newton_schulz,
    orthogonalise,
)
from trainwright.optim.whole_matrices import Axis, MatrixLayout, assign_owners

LOWEST = {3: 0.02, 4: 0.006, 5: 0.002}  # twice what the coefficients were made for: the bound on the largest is loose


@pytest.mark.parametrize("steps", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
def test_newton_schulz_brings_singular_values_near_one(steps: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.logspace(math.log10(LOWEST[steps]), 0, 12, dtype=torch.float64)
    result = newton_schulz(left @ torch.diag(values * 37.0) @ right, steps)
    reached = left.mT @ result @ right.mT
    assert torch.equal(reached.diagonal() > 0.7, torch.ones(12, dtype=torch.bool))
    assert reached.diagonal().max() < 1.3
    torch.testing.assert_close(reached, torch.diag(reached.diagonal()), atol=1e-9, rtol=0)


def test_newton_schulz_in_bf16_stays_near_and_zero_stays_zero() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    exact, rounded = newton_schulz(matrix), newton_schulz(matrix.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.999
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))
    for scale in (1e-12, 1e12):  # of gradients: far from 1 on both sides
        torch.testing.assert_close(newton_schulz(matrix * scale), exact, atol=1e-4, rtol=1e-3)


def test_batches_equal_single_matrices() -> None:
    matrices = [torch.randn(5, 8, dtype=torch.float64) for _ in range(3)]
    batch = newton_schulz(torch.stack(matrices))
    for one, other in zip(orthogonalise(matrices, 4), batch, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-12)


def test_muon_follows_its_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = nn.Parameter(torch.randn(4, 9, generator=generator, dtype=torch.float64))
    expected, buffer = weight.detach().clone(), torch.zeros(4, 9, dtype=torch.float64)
    optimizer = Muon(
        [{"params": [weight], "muon": True}], lr=0.1, momentum=0.9, weight_decay=0.5, ns_steps=5, ns_dtype="fp64"
    )
    for _ in range(3):
        grad = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        weight.grad = grad.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * grad
        direction = newton_schulz(0.1 * grad + 0.9 * buffer, 5)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * UPDATE_RMS * 3 * direction
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_muon_through_torchs_own_state_dict_goes_on_the_same() -> None:
    def build(seed: int) -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        groups = [{"params": [model[0].weight], "muon": True}, {"params": [model[0].bias, *model[1].parameters()]}]
        return model, Muon(groups, lr=0.01)

    def train(model: nn.Sequential, optimizer: Muon) -> None:
        optimizer.zero_grad()
        model(torch.ones(5, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    model, optimizer = build(0)
    train(model, optimizer)
    other, again = build(1)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_muon_takes_matrices_only() -> None:
    with pytest.raises(ConfigError, match="two dimensions"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


def test_ns_dtype_follows_device_and_master() -> None:
    assert default_ns_dtype(torch.device("cuda"), torch.float32) == torch.bfloat16
    assert default_ns_dtype(torch.device("cpu"), torch.float64) == torch.float64
    assert default_ns_dtype(torch.device("cpu"), torch.float32) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("blocks.0.attention.q.weight", True),
        ("transformer.h.0.mlp.c_fc.weight", True),
        ("lstm.weight_ih_l0", True),
        ("encoder.layer.0.output.dense.weight", True),
        ("model.decoder.layers.0.fc1.weight", True),
        ("embed.weight", False),
        ("model.embed_tokens.weight", False),
        ("transformer.wpe.weight", False),
        ("bert.embeddings.word_embeddings.weight", False),
        ("lm_head.weight", False),
        ("head.weight", False),
        ("cls.predictions.decoder.weight", False),
    ],
)
def test_hidden_matrices_by_name(name: str, hidden: bool) -> None:
    assert is_hidden_matrix(name, nn.Parameter(torch.zeros(4, 6))) is hidden
    assert not is_hidden_matrix(name, nn.Parameter(torch.zeros(4)))


def test_hidden_matrices_by_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(17, 4)
            self.inner = nn.Linear(4, 4)
            self.to_words = nn.Linear(4, 17)

    assert hidden_matrices(Net()) == {"inner.weight"}


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_rows_add_up_and_the_work_is_balanced(shapes: list[tuple[int, int]], replicas: int, shards: int) -> None:
    axes = {"replicate": Axis(None, replicas, 0), "shard": Axis(None, shards, 0)}
    layouts = [MatrixLayout(r, c, **axes) for r, c in shapes]
    for layout in layouts:
        rows = [layout.rows_of(s) for s in range(shards)]
        chunks = [c.shape[0] for c in torch.zeros(layout.rows).chunk(shards)]
        assert rows == chunks + [0] * (shards - len(chunks))
    owners = assign_owners(layouts)
    load: dict[tuple[int, int], int] = {(r, s): 0 for r in range(replicas) for s in range(shards)}
    for layout, owner in zip(layouts, owners, strict=True):
        load[owner] += layout.cost
    assert max(load.values()) - min(load.values()) <= max(layout.cost for layout in layouts)
