"""Our models as Hugging Face folders, and back.

The transformer is written as a Llama (with QK-norm: as a Qwen3), so that transformers, vLLM or llama.cpp read it.
Hugging Face models are written with their own config. Tensors come one at a time: no rank needs the whole model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.checkpoint.safetensors_folder import write_safetensors_folder
from trainwright.errors import ModelError
from trainwright.models.lstm import LstmLanguageModel
from trainwright.models.transformer import Transformer, TransformerSettings

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# Our name -> Hugging Face's, a layer's number in between.
_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def huggingface_name(name: str) -> str:
    """Hugging Face's Llama name of a parameter of our `Transformer`. To be given to `load_pretrained` as `rename`."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        return f"model.layers.{block[1]}.{_LAYER_NAMES[block[2]]}"
    return _TOP_NAMES[name]


def rename_for(module: nn.Module) -> Callable[[str], str] | None:
    """The `rename` with which `load_pretrained` reads an exported folder into this module."""
    return huggingface_name if isinstance(module, Transformer) else None


def huggingface_config(settings: TransformerSettings) -> dict[str, Any]:
    """config.json of our transformer: LlamaForCausalLM, or Qwen3ForCausalLM with QK-norm. Dropout is left out: neither
    has it."""
    kind = "qwen3" if settings.qk_norm else "llama"
    return {
        "architectures": ["Qwen3ForCausalLM" if settings.qk_norm else "LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.dim,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "intermediate_size": settings.ffn_dim,
        "hidden_act": "silu",
        "max_position_embeddings": settings.max_sequence_length,
        "rms_norm_eps": settings.norm_eps,
        # Both spellings: transformers 5 reads the first, older readers the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "rope_theta": settings.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": settings.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def settings_from_huggingface(folder: str | Path) -> TransformerSettings:
    """The settings of a Llama (or Qwen3) folder as our transformer's, from its config.json.

    Errors: ModelError for another architecture, or for what ours lacks (scaled RoPE, biases, another activation).
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "the folder of a Hugging Face model", "a folder with config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wrong = {
        "model_type": config.get("model_type") if config.get("model_type") not in ("llama", "qwen3") else None,
        "attention_bias": config.get("attention_bias") or None,
        "mlp_bias": config.get("mlp_bias") or None,
        "use_sliding_window": config.get("use_sliding_window") or None,
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
        "rope_type": None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope,
    }
    wrong = {key: value for key, value in wrong.items() if value is not None}
    if wrong:
        raise ModelError(
            f"{path}: {', '.join(f'{key} {value!r}' for key, value in wrong.items())}",
            "our transformer is a Llama (or Qwen3) with plain RoPE, SiLU and no biases",
            f"train it as a Hugging Face model: model.huggingface={folder}",
        )
    heads = config["num_attention_heads"]
    return TransformerSettings(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn_dim=config["intermediate_size"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qk_norm=config["model_type"] == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        max_sequence_length=config.get("max_position_embeddings", 2048),
    )


def export_huggingface(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    out: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> list[str]:
    """Writes a Hugging Face folder: config.json, safetensors, the tokenizer's files.

    module: gives the config and the names; its own tensors are not read. tensors: (name in the module, the whole tensor
    on the CPU), each parameter once. dtype: of the files, default the tensors' own. An LSTM has no architecture there:
    its folder has our config, for `models.build.from_config_dict`. Returns the files' names.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rename = rename_for(module) or (lambda name: name)
    kinds: set[torch.dtype] = set()

    def converted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            if value.is_floating_point():
                kinds.add(value.dtype)
            yield rename(name), value

    files = write_safetensors_folder(converted(), folder, max_shard_bytes)
    word = str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"
    _write_config(module, folder, word)
    if tokenizer_folder is not None:
        for name in _TOKENIZER_FILES:
            if (Path(tokenizer_folder) / name).is_file():
                shutil.copyfile(Path(tokenizer_folder) / name, folder / name)
        files += [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return ["config.json", *files]


def _architecture(module: nn.Module) -> str:
    """The model's class in transformers: `fully_shard` and `build_causal` put classes of their own in front of it."""
    import transformers

    names = [base.__name__ for base in type(module).__mro__]
    return next((name for name in names if hasattr(transformers, name)), names[0])


def _write_config(module: nn.Module, folder: Path, dtype: str) -> None:
    if isinstance(module, Transformer):
        config = {**huggingface_config(module.settings), "dtype": dtype}
    elif isinstance(module, LstmLanguageModel):
        config = {**module.config, "dtype": dtype}
    elif hasattr(module, "config") and hasattr(module.config, "to_dict"):
        huggingface: Any = module
        config = {**huggingface.config.to_dict(), "dtype": dtype, "architectures": [_architecture(module)]}
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    else:
        raise ModelError(
            f"{type(module).__name__} has no config that Hugging Face knows",
            "our models and transformers' are exported",
            "engine.full_state_dict() and safetensors.torch.save_file, for any other model",
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
