"""The two programs of the original articles: GPT-2 under ZeRO in fp16 with accumulation, and the LSTM language model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def _losses(*arguments: str) -> list[float]:
    """The losses that a program prints, epoch after epoch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600, cwd=EXAMPLES.parent
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr, done.stderr
    found = re.findall(r"^Epoch: (\d+), Loss: (\d+\.\d+)", done.stdout, re.MULTILINE)
    assert [int(epoch) for epoch, _ in found] == list(range(len(found))), "rank 0 alone prints, each epoch once"
    return [float(loss) for _, loss in found]


def test_gpt2_learns_a_poem_by_heart() -> None:
    losses = _losses(*TORCHRUN, str(EXAMPLES / "gpt2_zero.py"))
    assert losses[0] > 2.39  # where the article's printout starts
    assert losses[-1] < 0.1  # it ends at 0.044


def test_gpt2_from_weights_of_ones_own(tmp_path: Path) -> None:
    """One process, a folder as `save_pretrained` writes it; the tokens are those of its tokenizer."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    text = "so long lives this and this gives life to thee"
    words = {word: number for number, word in enumerate(sorted(set(text.split())))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="thee"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "gpt2")
    small = GPT2Config(
        vocab_size=len(words), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(f"{text} " * 8)
    own = ["--weights", str(tmp_path / "gpt2"), "--text", str(tmp_path / "text.txt"), "--length", "12"]
    losses = _losses(str(EXAMPLES / "gpt2_zero.py"), *own, "--epochs", "3", "--stage", "0", "--lr", "1e-2")
    assert losses[0] < 3.0, "ten words: at most log(10) and a little"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("ranks", [(), TORCHRUN], ids=["one process", "two ranks"])
def test_lstm_learns_words(ranks: tuple[str, ...]) -> None:
    arguments = ["--small", "--epochs", "3", *(["--stage", "2"] if ranks else [])]
    losses = _losses(*ranks, str(EXAMPLES / "lstm_lm.py"), *arguments)
    assert losses[0] < 6.4  # 500 words: log(500) = 6.2 at first
    assert losses[-1] < losses[0] - 0.5


def test_lstm_reads_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("this is the house that jack built .\n" * 120)
    losses = _losses(
        str(EXAMPLES / "lstm_lm.py"), "--small", "--text", str(tmp_path / "text.txt"), "--epochs", "2", "--lr", "1e-2",
        "--precision", "bf16",
    )  # fmt: skip
    assert losses[-1] < losses[0]
