"""Direct exchanges give what Gloo's own collectives give, at any number of ranks, size and format."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from trainwright import exchange

SIZES = (1, 7, 5000, (1 << 20) // 4 + 3)  # of a rank's part; the last takes more than one segment in every format but bf16
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _rank(rank: int) -> list[str]:
    import trainwright.distributed as start

    policy = os.sched_getscheduler(0) if sys.platform == "linux" else None
    start.start("gloo")
    ranks, group, wrong = dist.get_world_size(), dist.group.WORLD, []
    assert group is not None
    for size in SIZES:
        for dtype in DTYPES:
            whole = torch.randn(ranks, ranks * size, generator=torch.Generator().manual_seed(size)).to(dtype)
            mine, part = whole[rank].clone(), torch.empty(size, dtype=dtype)
            exchange.reduce_scatter(part, mine, group, dist.ReduceOp.SUM)
            # In the order of the ranks, 16 bits in fp32: to the bit.
            total = sum((row.to(torch.promote_types(dtype, torch.float32)) for row in whole[1:]), whole[0].to(torch.promote_types(dtype, torch.float32)))
            expected = total.to(dtype).chunk(ranks)
            late = torch.empty_like(part)
            under_way = exchange.reduce_scatter(late, mine, group, dist.ReduceOp.SUM, async_op=True)
            if dtype == torch.bfloat16:  # 16 bits on the wire, their sum in fp32
                sums = [torch.empty(size) for _ in range(2)]
                exchange.reduce_scatter(sums[0], mine, group, dist.ReduceOp.SUM)
                exchange.reduce_scatter(sums[1], mine, group, dist.ReduceOp.SUM, async_op=True).wait()
                if any(not torch.equal(found, total.chunk(ranks)[rank]) for found in sums):
                    wrong.append(f"reduce_scatter into fp32 {size}")
            apart = torch.empty(ranks * size, dtype=dtype)
            gathering = exchange.all_gather(apart, part, group, async_op=True)
            under_way.wait()
            gathering.wait()
            if not torch.equal(late, part) or not torch.equal(part, expected[rank]) or not torch.equal(mine, whole[rank]):
                wrong.append(f"reduce_scatter {dtype} {size}")
            in_place = torch.empty(ranks * size, dtype=dtype)
            own = in_place.chunk(ranks)[rank]
            own.copy_(part)
            exchange.all_gather(in_place, own, group)
            theirs = [torch.empty_like(part) for _ in range(ranks)]
            dist.all_gather(theirs, part)
            if not torch.equal(apart, torch.cat(theirs)) or not torch.equal(in_place, apart):
                wrong.append(f"all_gather {dtype} {size}")
            exchange.all_reduce(mine, group)
            gathered = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(gathered, mine)
            close = torch.allclose(mine.double(), total.double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
            if not close or any(not torch.equal(mine, other) for other in gathered):
                wrong.append(f"all_reduce {dtype} {size}")
    if sys.platform == "linux":
        tasks = {int(folder.name): (folder / "comm").read_text() for folder in Path("/proc/self/task").iterdir()}
        policies = {os.sched_getscheduler(task) for task, name in tasks.items() if name.startswith("gloo_tcp")}
        own = os.sched_getscheduler(0)
        with contextlib.suppress(OSError):  # a sandbox that does not allow it, a policy chosen from outside
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            os.sched_setscheduler(0, own, os.sched_param(0))
            if policies and own == os.SCHED_OTHER and policies != {os.SCHED_BATCH}:  # older torch names no thread so
                wrong.append(f"Gloo's threads interrupt those that compute: {policies}")
        if own != policy:
            wrong.append(f"the training thread's policy was {policy} and is {own}")
    scalar = torch.tensor(rank + 1.0)
    exchange.all_reduce(scalar, group)
    if scalar.item() != ranks * (ranks + 1) / 2 or scalar.dim():
        wrong.append("all_reduce of a scalar")
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_they_equal_the_sum_in_the_order_of_the_ranks(ranks: int) -> None:
    found: list[Any] = run_ranks(_rank, ranks)
    assert found == [[]] * ranks
