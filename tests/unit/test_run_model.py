"""What a run's model is asked before it is cut up."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.config import load_config
from trainwright.errors import ConfigError
from trainwright.run_model import RunModel


@pytest.mark.parametrize(
    ("model", "length", "remedy"),
    [
        ("model.transformer={dim: 16, layers: 1, heads: 2, max_sequence_length: 64}", 65, "model.transformer.max_sequence_length=65"),
        ("model.preset=smollm2-135m", 8193, "data.sequence_length=8192"),
    ],
)  # fmt: skip
def test_a_sequence_longer_than_the_model_is_refused_before_the_start(model: str, length: int, remedy: str) -> None:
    resolved = load_config(None, [model, f"data.sequence_length={length}"])
    with pytest.raises(
        ConfigError, match=f"data.sequence_length={length} for a model of {length - 1} positions"
    ) as refused:
        RunModel(resolved, 40, 1, resumed=False).build(5)
    assert remedy in str(refused.value)


def test_so_is_one_longer_than_a_hugging_face_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, vocab_size=40).save_pretrained(tmp_path)
    resolved = load_config(None, [f"model.huggingface={tmp_path}", "data.sequence_length=33"])
    with pytest.raises(ConfigError, match=r"remedy: data\.sequence_length=32$"):
        RunModel(resolved, 40, 1, resumed=False).build(5)
