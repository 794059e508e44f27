"""Sums of what ranks have sent, whatever lies where in memory."""

from __future__ import annotations

import pytest
import torch

from trainwright import exchange


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_sums_arrive_in_outputs_of_any_layout(
    shape: tuple[int, ...], parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PIECE", 2)
    given = [
        torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].to(dtype) + n for n in range(parts)
    ]
    expected = sum(part.double() for part in given)
    whole = torch.empty(shape, dtype=dtype)
    for output in (
        whole,
        torch.empty(shape[::-1], dtype=dtype).t() if len(shape) == 2 else torch.stack((whole, whole), -1)[..., 0],
    ):
        exchange._sum_into(output, given)
        assert torch.equal(output.double().reshape(-1), expected.reshape(-1))
