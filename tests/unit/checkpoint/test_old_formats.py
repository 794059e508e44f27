"""What format 1 wrote is read for ever: a checkpoint of two ranks, and a data set from before the documents' checksums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trainwright as tw
from small import batches, transformer
from trainwright.data.shards import TokenDataset, check

GOLDEN = Path(__file__).parents[2] / "golden"


def test_a_checkpoint_of_format_1_goes_on() -> None:
    """Three steps were done at ZeRO 2 on two ranks; the loss of the fourth was printed by the program that wrote it."""
    torch.set_num_threads(1)
    config = {"zero": 0, "optimizer": {"lr": 1e-2}, "ema": 0.9}
    engine = tw.initialize(
        model=lambda: transformer(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=12), config=config
    )
    assert engine.load(GOLDEN / "checkpoint-1") == {"note": "written by format 1"}
    assert engine.global_step == 3
    tokens, labels = batches(1, rows=4)[0]
    assert engine.train_batch({"input_ids": tokens, "labels": labels}) == pytest.approx(3.121843858198686, rel=1e-6)
    engine.close()


def test_a_data_set_of_format_1_is_whole() -> None:
    folder = GOLDEN / "tokens-1"
    check(folder)
    dataset = TokenDataset.open(folder)
    assert dataset.version == "5cb673cf77f70a9b5e62afe9df4adccf5666b7ebd8f1b236b050a6077da9daf1"
    text = dataset.load_tokenizer().decode(dataset.split("held_out").read(0, 41)[0].tolist())
    assert text == "the quick brown fox 3 jumps over the lazy dog again and again\n"
