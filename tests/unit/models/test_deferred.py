"""Models built without memory: what their constructors do to parameters is written down and done later."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.init import trunc_normal_ as imported_trunc_normal_

from trainwright.errors import ModelError
from trainwright.models.deferred import build_on_meta, recipes_of


class Zoo(nn.Module):
    """One of each way to initialise a parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 300)
        self.second = nn.Linear(300, 7)
        self.embedding = nn.Embedding(9, 4, padding_idx=2)
        self.truncated = nn.Parameter(torch.empty(400, 30))
        imported_trunc_normal_(self.truncated, mean=1.0, std=0.1, a=0.9, b=1.1)
        self.orthogonal = nn.Parameter(torch.empty(6, 6))
        nn.init.orthogonal_(self.orthogonal)
        self.drawn = nn.Parameter(torch.randn(4))
        self.constant = nn.Parameter(torch.ones(3) * 2)
        self.head = nn.Linear(5, 300)
        self.head.weight = self.first.weight
        self.copy = nn.Linear(300, 7)
        self.copy.load_state_dict(self.second.state_dict())
        self.recurrent = nn.LSTM(4, 8)
        self.register_buffer("table", torch.arange(4.0).cos(), persistent=False)
        held = nn.Parameter(torch.empty(20, 2))
        self.held = held
        nn.init.constant_(held, 3.0)  # through a name of its own, after registration
        with torch.no_grad():
            self.held[1:3] *= 2
            self.second.weight.data.normal_(0, 0.5)
            self.first.weight.mul_(0.1)


@pytest.fixture(scope="module")
def zoo():
    return build_on_meta(Zoo, seed=5)


def values(module, name, seed=0):
    recipe = recipes_of(module)[name]
    with torch.random.fork_rng(devices=[]):
        return recipe.rows(seed, name, slice(0, recipe.view.size[0]))


def test_parameters_have_no_memory_and_buffers_do(zoo):
    assert all(p.is_meta for p in zoo.parameters())
    assert torch.equal(zoo.table, torch.arange(4.0).cos())
    assert zoo.head.weight is zoo.first.weight
    assert set(recipes_of(zoo)) == {name for name, _ in zoo.named_parameters()}


def test_what_the_constructor_did_is_done_again(zoo):
    assert values(zoo, "embedding.weight")[2].eq(0).all()
    assert values(zoo, "embedding.weight")[3].ne(0).all()
    truncated = values(zoo, "truncated")
    assert truncated.min() >= 0.9
    assert truncated.max() <= 1.1
    assert truncated.mean().item() == pytest.approx(1.0, abs=0.005)
    square = values(zoo, "orthogonal")
    assert torch.allclose(square @ square.t(), torch.eye(6), atol=1e-5)
    assert values(zoo, "constant").eq(2).all()
    held = values(zoo, "held")
    assert held[1:3].eq(6).all()
    assert held[3:].eq(3).all()
    assert values(zoo, "second.weight").std().item() == pytest.approx(0.5, rel=0.1)
    bound = 0.1 / 5**0.5
    assert values(zoo, "first.weight").abs().max().item() == pytest.approx(bound, rel=0.02)
    assert values(zoo, "recurrent.weight_hh_l0").abs().max().item() == pytest.approx(1 / 8**0.5, rel=0.05)


def test_a_copy_equals_what_it_was_copied_from(zoo):
    assert torch.equal(values(zoo, "copy.bias"), values(zoo, "second.bias"))


def test_values_drawn_before_registration_are_kept(zoo):
    assert torch.equal(values(zoo, "drawn"), values(zoo, "drawn", seed=9))
    assert torch.equal(values(build_on_meta(Zoo, seed=5), "drawn"), values(zoo, "drawn"))
    assert not torch.equal(values(build_on_meta(Zoo, seed=6), "drawn"), values(zoo, "drawn"))


def test_rows_are_the_same_however_they_are_cut(zoo):
    for name, recipe in recipes_of(zoo).items():
        whole, size = values(zoo, name), recipe.view.size[0]
        cuts = [0, size // 3, size // 3, size - 1, size]
        with torch.random.fork_rng(devices=[]):
            parts = [recipe.rows(0, name, slice(a, b)) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), name


def test_names_and_seeds_decide(zoo):
    assert not torch.equal(values(zoo, "first.bias"), values(zoo, "head.bias"))
    assert not torch.equal(values(zoo, "first.bias"), values(zoo, "first.bias", seed=1))


def test_building_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_on_meta(Zoo)
    assert torch.equal(torch.rand(1), expected)
    assert not nn.Linear(2, 2).weight.is_meta  # and the hook is gone


def test_a_large_model_takes_no_memory():
    module = build_on_meta(lambda: nn.Sequential(*(nn.Linear(1 << 17, 1 << 17) for _ in range(4))))
    assert sum(p.numel() for p in module.parameters()) > 1 << 36
    with torch.random.fork_rng(devices=[]):
        recipe = recipes_of(module)["2.weight"]
        assert recipe.rows(0, "2.weight", slice(70_000, 70_002)).shape == (2, 1 << 17)


def test_a_constructor_that_reads_values_is_refused_with_a_way_out():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.norm = self.weight.norm().item()

    with pytest.raises(ModelError, match="pass the module itself"):
        build_on_meta(Reads)


def test_a_parameter_nobody_initialised_has_an_empty_recipe():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

    assert recipes_of(build_on_meta(Bare))["weight"].empty
