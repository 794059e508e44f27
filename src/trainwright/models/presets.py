"""Transformers by name, with their public dimensions. The vocabulary is the tokenizer's where one is given."""

from __future__ import annotations

from dataclasses import replace

from trainwright.models.transformer import TransformerSettings


def _settings(
    vocab_size: int, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, **others: object
) -> TransformerSettings:
    head_dim = dim // heads
    base = TransformerSettings(vocab_size, dim, layers, heads, kv_heads, ffn_dim, head_dim)
    return replace(base, **others)  # type: ignore[arg-type]


# The names up to 30m count the parameters of the blocks (the embedding comes on top: it depends on the vocabulary);
# the others are those of the published models, their own vocabulary included.
PRESETS: dict[str, TransformerSettings] = {
    "llama-1m": _settings(8192, 128, 5, 4, 4, 352),
    "llama-5m": _settings(8192, 256, 6, 4, 4, 704),
    "llama-10m": _settings(8192, 320, 8, 5, 5, 864),
    "llama-30m": _settings(16384, 512, 10, 8, 8, 1376),
    "llama-124m": _settings(50304, 768, 12, 12, 12, 2048),
    "llama-350m": _settings(50304, 1024, 24, 16, 16, 2736),
    "smollm2-135m": _settings(
        49152, 576, 30, 9, 3, 1536, rope_theta=100_000.0, max_sequence_length=8192
    ),  # Hugging Face SmolLM2
    "smollm2-360m": _settings(49152, 960, 32, 15, 5, 2560, rope_theta=100_000.0, max_sequence_length=8192),
    "smollm2-1.7b": _settings(49152, 2048, 24, 32, 32, 8192, rope_theta=130_000.0, max_sequence_length=8192),
    "tinyllama-1.1b": _settings(32000, 2048, 22, 32, 4, 5632, tied=False),  # TinyLlama, arXiv 2401.02385
    # Llama 2, arXiv 2307.09288.
    "llama2-7b": _settings(32000, 4096, 32, 32, 32, 11008, tied=False, max_sequence_length=4096),
    "llama2-13b": _settings(32000, 5120, 40, 40, 40, 13824, tied=False, max_sequence_length=4096),
    "llama2-70b": _settings(32000, 8192, 80, 64, 8, 28672, tied=False, max_sequence_length=4096),
    # Llama 3 (arXiv 2407.21783), at its first context of 8,192: the later scaling of RoPE is not part of the preset.
    "llama-1b": _settings(128256, 2048, 16, 32, 8, 8192, rope_theta=500_000.0, max_sequence_length=8192),
    "llama-3b": _settings(128256, 3072, 28, 24, 8, 8192, rope_theta=500_000.0, max_sequence_length=8192),
    "llama-8b": _settings(128256, 4096, 32, 32, 8, 14336, rope_theta=500_000.0, max_sequence_length=8192, tied=False),
    "llama-70b": _settings(
        128256, 8192, 80, 64, 8, 28672, rope_theta=500_000.0, max_sequence_length=8192, tied=False
    ),
    "llama-405b": _settings(
        128256, 16384, 126, 128, 8, 53248, rope_theta=500_000.0, max_sequence_length=8192, tied=False
    ),
    # Qwen3 (arXiv 2505.09388): QK-norm.
    "qwen3-0.6b": _settings(
        151936, 1024, 28, 16, 8, 3072, head_dim=128, qk_norm=True, rope_theta=1e6, norm_eps=1e-6,
        max_sequence_length=40960,
    ),
    "qwen3-8b": _settings(
        151936, 4096, 36, 32, 8, 12288, head_dim=128, qk_norm=True, rope_theta=1e6, norm_eps=1e-6,
        max_sequence_length=40960, tied=False,
    ),
}  # fmt: skip


def preset_names() -> list[str]:
    """The presets, small to large within a family."""
    return list(PRESETS)
