"""Before a run: what can be known before its ranks are started (the backend, the optimizer, the model, the data set, the object
store), and what the ranks find out together before anything is built."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from trainwright import distributed
from trainwright.checkpoint.store import CheckpointStore
from trainwright.config import Config
from trainwright.config.check import check_trainable
from trainwright.data.mix import open_dataset
from trainwright.errors import ConfigError, DataError
from trainwright.guard.same_machines import check_same_software
from trainwright.guard.shared_folder import Sites, describe, sites_of
from trainwright.guard.together import together
from trainwright.launch.worker import is_worker
from trainwright.model_source import model_for
from trainwright.monitor.sinks import check_installed
from trainwright.optim.catalogue import constructor_arguments, optimizer_class
from trainwright.run_folder import group_folder


def preflight(config: Config) -> None:
    """Raises LaunchError, ConfigError, ModelError, StorageError or DataError for what every rank would raise, only sooner and once."""
    distributed.check_backend(config.parallel.backend)
    constructor_arguments(optimizer_class(config.optimizer.name), config.optimizer)
    if config.checkpoint.store is not None:
        CheckpointStore(config.checkpoint.store).objects.check()
    dataset = open_dataset(config.data)
    split, length = dataset.split("train"), config.data.sequence_length
    tokens = split.num_tokens
    if split.num_sequences(length) == 0:
        raise DataError(
            f"data.sequence_length={length:,} for {tokens:,} training tokens",
            "the training split holds at least one sequence and the token behind it",
            f"data.sequence_length={max(1, min(256, tokens - 1))}",
        )
    assert config.model is not None, "check_trainable comes first"
    model_for(config.model, dataset.vocab_size)


def look_ahead(config: Config) -> str | None:
    """Refuses, on all ranks together, what can be refused before anything is built: what `preflight` finds on any machine
    (our own launcher has looked before it started ranks), and versions that differ. What is to be said of the machines'
    clocks. Collective."""

    def look() -> None:
        check_trainable(config)
        check_installed(config.track)
        if not is_worker() and distributed.several():
            preflight(config)

    together(look, "a look ahead")
    return check_same_software()


def run_folder(config: Config) -> Path:
    """The run's folder, the same on all ranks; a new one under runs/ where the config names none. Collective."""
    name = group_folder(config.run_dir, config.outer.group)
    if name is None:
        assert config.model is not None
        what = config.model.preset or config.model.huggingface or ("lstm" if config.model.lstm else "transformer")
        name = f"runs/{Path(what).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(distributed.from_main(name))
    if distributed.is_main():
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir={name}: {error}", "the run writes to its folder", "run_dir=runs/my-run"
            ) from None
    return path


def run_sites(config: Config, run_dir: Path) -> Sites:
    """Which ranks share the run's folder. Raises ConfigError where several do not and no object store holds the
    checkpoints: what each machine wrote would lie on its own disk, and no checkpoint would be whole. Collective."""
    sites = sites_of(run_dir / "checkpoints")
    if not sites.shared and config.checkpoint.store is None:
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, distributed.host())
        raise ConfigError(
            f"run_dir={run_dir} is one folder of {describe(sites, hosts)}",
            "all ranks write their parts of a checkpoint to one place",
            f"run_dir on storage that all machines share, or checkpoint.store=s3://bucket/{run_dir.name}",
        )
    return sites
