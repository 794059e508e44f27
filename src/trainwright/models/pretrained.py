"""Hugging Face models: by folder, name or config; random, or with their weights read onto the shards.

A model that the user brings keeps Hugging Face's conventions. One that `build_causal` makes for `trainwright train`
takes labels that are already shifted, as our own models do.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from trainwright.errors import ModelError
from trainwright.fused.cross_entropy import IGNORE_INDEX, summed_cross_entropy
from trainwright.models.deferred import build_on_meta
from trainwright.models.lazy_logits import lazy_logits
from trainwright.models.output import LMOutput

# Types that exist as causal models too (BertLMHeadModel), but are masked models by trade.
_MASKED_TYPES = frozenset({"albert", "bert", "camembert", "deberta", "distilbert", "electra", "roberta", "xlm-roberta"})


def resolve_folder(name: str | Path) -> Path:
    """The folder of a model: `name` itself, or what the Hugging Face hub (or its cache) has under that name.

    Errors: ModelError when it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise ModelError(
            f"{name} is a GGUF file",
            "a model is a folder in Hugging Face's format",
            f"trainwright.models.pretrained.convert_gguf({str(name)!r}, 'folder') once, then the folder",
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except ImportError:
        reason = "transformers is not installed: pip install 'trainwright[hf]'"
    except Exception as error:
        # The hub's errors are many (no network, no such name, a gate); each means that there is no folder.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    raise ModelError(
        f"{name!r} is no folder here, and the hub did not give it ({reason})",
        "a folder with config.json, or a name that the hub or its local cache has",
        "fetch it where there is a network (huggingface-cli download NAME --local-dir DIR) and give DIR",
    )


def load_config(name: str | Path) -> Any:
    """The model's Hugging Face config. Nothing of the model's own code is run (no trust_remote_code)."""
    transformers = _transformers()
    folder = resolve_folder(name)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no usable config.json ({str(error).splitlines()[0]})",
            "the folder of a model whose type transformers knows",
            "a folder written by save_pretrained",
        ) from error


def build_huggingface(source: Any, seed: int = 0) -> nn.Module:
    """The model of a folder, a name or a config object, parameters on the meta device with their recipes; fp32.

    The class is the one that the config names in `architectures`; else the encoder-decoder, causal or masked language
    model of its type.
    """
    config = load_config(source) if isinstance(source, str | Path) else source
    model_class = _class_of(config)
    return build_on_meta(lambda: model_class._from_config(config, dtype=torch.float32), seed)


def build_causal(source: Any, seed: int = 0) -> nn.Module:
    """As `build_huggingface`, for a causal model that is to take labels already shifted, like ours.

    Errors: ModelError for a model that is not causal.
    """
    module = build_huggingface(source, seed)
    if not shifts_labels(module):
        raise ModelError(
            f"{type(module).__name__} is not a causal language model",
            "`trainwright train` predicts the next token",
            "train it from Python: tw.initialize(model=...) with batches of its own kind",
        )
    model_class: Any = type(module)
    module.__class__ = _pre_shifted(model_class)
    return module


class PreShiftedCausalLM:
    """Mixed into a Hugging Face causal model by `build_causal`: labels[b, t] is the target of position t.

    The loss is Σ / max(valid, 1), so that a batch without labels gives 0 and not NaN. Returns an `LMOutput` with
    labels, the model's own output without.
    """

    @property
    def vocab_size(self) -> int:
        config: Any = self.config  # type: ignore[attr-defined]
        return int(config.get_text_config().vocab_size)


@functools.cache
def _pre_shifted(model_class: Any) -> type:
    inner: Any = model_class.forward

    @functools.wraps(inner)  # generate() reads the signature
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return inner(self, *args, **kwargs)
        kwargs.setdefault("use_cache", False)
        with lazy_logits():
            logits = inner(self, *args, **kwargs).logits
        loss_sum, tokens = summed_cross_entropy(logits, labels)
        return LMOutput(loss_sum / tokens.clamp(min=1), None, loss_sum, tokens)

    # Its module stays Hugging Face's: it is their model, and is treated as such.
    members = {"forward": forward, "__module__": model_class.__module__}
    return type(f"PreShifted{model_class.__name__}", (PreShiftedCausalLM, model_class), members)


def shifts_labels(module: nn.Module) -> bool:
    """Whether the module's own loss shifts the labels by one (Hugging Face's causal models, user-brought)."""
    if "transformers" not in sys.modules or isinstance(module, PreShiftedCausalLM):
        return False
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto

    if not isinstance(module, PreTrainedModel) or getattr(module.config, "is_encoder_decoder", False):
        return False
    # `fully_shard` puts a class of its own in front: look at all of them.
    names = {base.__name__ for base in type(module).__mro__}
    tables = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return any(names & set(_flat(table.values())) for table in tables)


def count_valid_tokens(module: nn.Module, labels: Int[Tensor, "*batch"]) -> Shaped[Tensor, ""]:
    """[] int64: the positions whose label enters the module's loss.

    A module that shifts inside never uses the first label of a row; ours, masked and encoder-decoder models use all.
    """
    counted = labels[..., 1:] if shifts_labels(module) else labels
    return (counted != IGNORE_INDEX).sum()


def ignored_when_loading(module: nn.Module) -> tuple[str, ...]:
    """Patterns of what a folder's files may hold and a Hugging Face module need not take: attention masks and position
    tables of old, and heads of tasks that the class does not have."""
    if not hasattr(getattr(module, "config", None), "to_dict"):
        return ()
    old = ("*.attn.bias", "*.attn.masked_bias", "*.position_ids", "*.rotary_emb.inv_freq")
    return (*old, "*.seq_relationship.*", "*pooler.*", "*.EncDecAttention.relative_attention_bias.weight")


def convert_gguf(gguf: str | Path, out: str | Path) -> Path:
    """Turns a GGUF file into a Hugging Face folder (fp32 safetensors, config, tokenizer), once, on one process.

    The whole model is held in memory meanwhile: quantised weights have to be decoded. Returns the folder.
    """
    transformers = _transformers()
    path, folder = Path(gguf), Path(out)
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "a GGUF file", "the path of a .gguf file")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{' and '.join(missing)} not installed",
            "transformers reads GGUF files with them",
            "pip install 'trainwright[hf]'",
        )
    quantization = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=quantization, dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what is written is not quantised any more
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "transformers is not installed", "Hugging Face models need it", "pip install 'trainwright[hf]'"
        ) from error
    return transformers


def _class_of(config: Any) -> Any:
    transformers = _transformers()
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if getattr(config, "is_encoder_decoder", False):
        tables = [transformers.AutoModelForSeq2SeqLM]
    else:
        tables = [transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM]
        if config.model_type in _MASKED_TYPES:
            tables.reverse()
    for auto in tables:
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ModelError(
        f"model type {config.model_type!r}",
        "a causal, masked or encoder-decoder language model of transformers",
        "pass the module itself: initialize(model=module, ...)",
    )


def _flat(values: Any) -> list[str]:
    return [name for value in values for name in (value if isinstance(value, tuple | list) else (value,))]
