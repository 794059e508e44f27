"""AdamW with moments and parameters in bf16: the rounding, the mean path, what is kept, resumes."""

from __future__ import annotations

import copy

import pytest
import torch

from trainwright.optim.compact_adamw import CompactAdamW, stochastic_bf16


def _train(optimizer, parameter, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_in_fp32_it_is_torchs(decoupled):
    values = torch.randn(3, 5)
    one, other = (torch.nn.Parameter(values.clone()) for _ in range(2))
    words = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    _train(CompactAdamW([one], moments=torch.float32, decoupled=decoupled, **words), one, 10)
    _train((torch.optim.AdamW if decoupled else torch.optim.Adam)([other], **words), other, 10)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    noise = torch.Generator().manual_seed(0)
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    rounded = stochastic_bf16(value, noise)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.double().mean().item() == pytest.approx(value[0].item(), abs=1e-4)
    exact = torch.tensor([0.0, -1.5, 3.0, float("inf"), -float("inf")])
    assert torch.equal(stochastic_bf16(exact, noise).float(), exact)
    assert stochastic_bf16(torch.tensor([float("nan")]), noise).isnan().all()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_bf16_parameters_follow_fp32s_where_plain_bf16_stands_still(rounding):
    """Updates of 1e-4 of a weight near 1: below half of bf16's last place."""

    def path(dtype, optimizer):
        parameter = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
        made = optimizer([parameter])
        for _ in range(200):
            parameter.grad = torch.ones_like(parameter)
            made.step()
        return parameter.detach().double().mean().item()

    expected = path(torch.float32, lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0))
    still = path(torch.bfloat16, lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0))
    found = path(torch.bfloat16, lambda p: CompactAdamW(p, lr=1e-4, rounding=rounding))
    assert expected == pytest.approx(0.98, abs=1e-3)
    assert still == 1.0
    assert found == pytest.approx(expected, abs=2e-3)


def test_what_is_kept_and_that_a_resumed_run_rounds_alike():
    parameter = torch.nn.Parameter(torch.randn(1000).bfloat16())
    optimizer = CompactAdamW([parameter], lr=1e-2, rounding="kahan")
    _train(optimizer, parameter, 5)
    state = optimizer.state[parameter]
    assert {name: t.dtype for name, t in state.items() if name != "step"} == {
        "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "compensation": torch.bfloat16,
    }  # fmt: skip
    twin = torch.nn.Parameter(parameter.detach().clone())
    other = CompactAdamW([twin], lr=1e-2, rounding="kahan")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("exp_avg", "exp_avg_sq", "compensation"):
        assert other.state[twin][name].dtype == torch.bfloat16
    _train(optimizer, parameter, 3, seed=1)
    _train(other, twin, 3, seed=1)
    assert torch.equal(parameter, twin)
