"""The smallest run that uses every part of a launch: ranks sum a tensor over Gloo. `trainwright doctor` starts it."""

from __future__ import annotations

from datetime import timedelta


def main(argv: list[str]) -> int:
    """On each rank: all-reduce 1 MiB; 0 when the sum is right."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    ranks = dist.get_world_size()
    numbers = torch.full((2**18,), float(dist.get_rank() + 1))
    dist.all_reduce(numbers)
    right = bool((numbers == ranks * (ranks + 1) / 2).all())
    dist.barrier()
    dist.destroy_process_group()
    return 0 if right else 1
