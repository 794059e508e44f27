"""What can be known of a run before its ranks are started: the backend, the optimizer, the model, the data set, the
object store."""

from __future__ import annotations

from trainwright import distributed
from trainwright.checkpoint.store import CheckpointStore
from trainwright.config import Config
from trainwright.data.mix import open_dataset
from trainwright.errors import DataError
from trainwright.model_source import model_for
from trainwright.optim.catalogue import constructor_arguments, optimizer_class


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
