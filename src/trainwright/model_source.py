"""From the config's `model` to what `startup` takes: a module without values, and what fills it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from trainwright.checkpoint.weights import load_pretrained
from trainwright.config.schema import ModelConfig
from trainwright.errors import ModelError
from trainwright.models.build import build
from trainwright.models.pretrained import pretrained_exceptions, resolve_folder


def model_for(config: ModelConfig, vocab_size: int, seed: int) -> tuple[nn.Module, Callable[[nn.Module], None] | None]:
    """(module on the meta device, what reads its pretrained weights onto the shards or None for initial values).

    Raises ModelError where the data set's tokens do not fit the model's vocabulary.
    """
    module = build(config, vocab_size, seed)
    own = int(module.vocab_size)
    if own < vocab_size:
        raise ModelError(
            f"a model of {own:,} tokens on data of {vocab_size:,}",
            "every token of the data has a row in the embedding",
            "prepare the data with the model's own tokenizer: --tokenizer FOLDER",
        )
    if config.weights != "pretrained":
        return module, None
    assert config.huggingface is not None, "the config's check has seen to it"
    folder = resolve_folder(config.huggingface)

    def load(shards: nn.Module) -> None:
        load_pretrained(shards, folder, allow_unexpected=pretrained_exceptions(shards))

    return module, load
