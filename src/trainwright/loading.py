"""`tw.data_loader`: the token data set's loader for those who write the loop themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainwright import distributed
from trainwright.config import Config, Resolved, load_config
from trainwright.data.loader import TokenLoader
from trainwright.data.plan import plan_batches
from trainwright.data.shards import TokenDataset
from trainwright.errors import ConfigError
from trainwright.mesh import resolve_degrees


def data_loader(config: str | Path | Mapping[str, Any] | Config | Resolved) -> TokenLoader:
    """This replica's batches of the config's data set, one for each optimizer step (`engine.train_batch(batch)`).

    Its `state_dict()` belongs into `engine.save(path, state=...)`. Collective: starts the process group if none runs.
    """
    resolved = load_config(config).config
    if resolved.data.path is None:
        raise ConfigError("data.path is not set", "a loader reads a token data set", "data.path=FOLDER")
    distributed.start(resolved.parallel.backend)
    degrees = resolve_degrees(resolved.parallel, resolved.zero.stage, dist.get_world_size())
    replicas = degrees.replicate * degrees.shard
    # Model-parallel axes are innermost (context, tensor) or outermost (pipeline): neighbours share a replica.
    replica = dist.get_rank() // (degrees.context * degrees.tensor) % replicas
    return TokenLoader(
        TokenDataset.open(resolved.data.path).split("train"),
        resolved.data.sequence_length,
        plan_batches(resolved.batch, resolved.data.sequence_length, replicas),
        seed=resolved.seed,
        shuffle=resolved.data.shuffle,
        replica=replica,
        replicas=replicas,
        prefetch=2 * resolved.data.workers,
        document_mask=resolved.data.document_mask,
    )
