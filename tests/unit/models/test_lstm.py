"""The LSTM language model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.errors import ConfigError
from trainwright.models.dropout import dropout_context
from trainwright.models.lstm import LstmLanguageModel, LstmSettings


def small(**changes):
    torch.manual_seed(0)
    return LstmLanguageModel(
        LstmSettings(**{"vocab_size": 31, "embedding_dim": 12, "hidden_dim": 12, "layers": 2, **changes})
    )


def tokens(batch=2, length=9):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_plain_logits(tied):
    model, ids = small(tied=tied), tokens()
    labels = ids.roll(-1, 1)
    labels[0, 2:5] = -100
    out = model(ids, labels=labels)
    out.loss.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    assert torch.allclose(out.loss, expected, atol=1e-6)
    assert out.tokens.item() == 15
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, fused[name], atol=1e-6), name


def test_the_state_carries_on():
    model, ids = small(), tokens()
    cache = model.new_cache(2, 9)
    parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 5), (5, 9))]
    assert torch.allclose(torch.cat(parts, 1), model(ids).logits, atol=1e-6)


def test_dropout_is_keyed_by_sample():
    model, ids = small(dropout=0.5), tokens(batch=3)
    with dropout_context(1, 1, torch.tensor([3, 4, 5])):
        whole = model(ids).logits
    with dropout_context(1, 1, torch.tensor([4])):
        assert torch.allclose(model(ids[1:2]).logits, whole[1:2], atol=1e-6)


def test_forget_gates_start_open():
    model = small()
    assert model.layers[0].bias_ih_l0[12:24].eq(1).all()
    assert not model.layers[0].bias_hh_l0.any()


def test_tying_unequal_widths_is_refused():
    with pytest.raises(ConfigError, match="embedding_dim = hidden_dim"):
        small(tied=True, hidden_dim=16)


def test_flops():
    model = small()
    assert model.flops_per_token(100) == 6 * (sum(p.numel() for p in model.layers.parameters()) + 31 * 12)
