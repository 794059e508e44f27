"""The config's `model`: the dimensions of our models, or a Hugging Face model's name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainwright.config.section import Count, Section


class TransformerModel(Section):
    """Dimensions of the Llama-family transformer; what is left out comes from `model.preset`."""

    vocab_size: Count | None = Field(None, gt=0, description="Entries of the embedding; by default the tokenizer's.")
    layers: Count | None = Field(None, gt=0, description="Number of blocks.")
    dim: Count | None = Field(None, gt=0, description="Width of the residual stream, D.")
    heads: Count | None = Field(None, gt=0, description="Query heads, H; divides `dim` unless `head_dim` is given.")
    kv_heads: Count | None = Field(None, gt=0, description="Key and value heads; divides `heads`.")
    head_dim: Count | None = Field(None, gt=0, description="Width of a head; even. Default `dim / heads`.")
    ffn_dim: Count | None = Field(None, gt=0, description="Inner width of the SwiGLU feed-forward.")
    rope_theta: float | None = Field(None, gt=0, description="Base of the rotary embedding's frequencies.")
    norm_eps: float | None = Field(None, gt=0, description="Epsilon of RMSNorm.")
    qk_norm: bool | None = Field(None, description="RMSNorm on queries and keys.")
    tied: bool | None = Field(None, description="Head and embedding are one parameter.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout on attention and feed-forward outputs.")
    max_sequence_length: Count | None = Field(None, gt=0, description="Longest sequence the model is meant for.")


class LstmModel(Section):
    """The LSTM language model: embedding, `layers` LSTM layers, projection to the vocabulary."""

    vocab_size: Count | None = Field(None, gt=0, description="Entries of the embedding; by default the tokenizer's.")
    embedding_dim: Count = Field(512, gt=0, description="Width of the embedding.")
    hidden_dim: Count = Field(1024, gt=0, description="Width of each LSTM layer.")
    layers: Count = Field(6, gt=0, description="Number of LSTM layers.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout between the layers.")
    tied: bool = Field(False, description="Head and embedding are one parameter; needs embedding_dim = hidden_dim.")


class ModelConfig(Section):
    """The model: one of `preset`, `transformer`, `lstm` or `huggingface`. Absent when it comes from Python."""

    preset: str | None = Field(
        None,
        description="A transformer by name, such as llama-10m or llama-8b (docs/concepts.md lists them).",
    )
    transformer: TransformerModel | None = Field(
        None, description="Dimensions of the transformer: alone, or over those of `preset`."
    )
    lstm: LstmModel | None = Field(None, description="Dimensions of the LSTM language model.")
    huggingface: str | None = Field(None, description="Folder or name of a Hugging Face model.")
    weights: Literal["random", "pretrained"] = Field(
        "random", description="Where a Hugging Face model's values come from: its config alone, or its weight files."
    )
