"""One rank of a job that some launcher started: trains two steps with no further setting and prints what it saw."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

import trainwright as tw
from small import batches, share, transformer
from trainwright import distributed

torch.set_num_threads(1)
if "TRAINWRIGHT_RENDEZVOUS" in os.environ:  # many runs at once: no ports to fight over
    dist.init_process_group(
        "gloo",
        init_method=os.environ["TRAINWRIGHT_RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
engine = tw.initialize(model=transformer, config={"zero": 2, "optimizer": {"lr": 1e-2}})
rank, world_size = dist.get_rank(), dist.get_world_size()
losses = [
    engine.train_batch({"input_ids": share(x, rank, world_size), "labels": share(y, rank, world_size)})
    for x, y in batches(2)
]
engine.close()
# One write a rank, newline included: launchers that merge outputs do not cut it.
sys.stdout.write(json.dumps({"rank": rank, "world_size": world_size, "losses": losses}) + "\n")
sys.stdout.flush()
distributed.shutdown()
