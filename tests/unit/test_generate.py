"""Generation: cached against uncached, sampling, prompts of several lengths."""

from __future__ import annotations

import pytest
import torch

from trainwright.errors import UsageError
from trainwright.generate import GenerationSettings, choose, continue_prompts, generate
from trainwright.models.lstm import LstmLanguageModel, LstmSettings
from trainwright.models.transformer import Transformer, TransformerSettings


def transformer():
    torch.manual_seed(0)
    return Transformer(TransformerSettings(41, 32, 2, 4, 2, 48, 8, tied=False))


def lstm():
    torch.manual_seed(0)
    return LstmLanguageModel(LstmSettings(41, 16, 16, 2))


def huggingface():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("build", [transformer, lstm, huggingface])
def test_cached_greedy_is_uncached_greedy_for_prompts_of_any_length(build):
    model = build()
    greedy = GenerationSettings(max_new_tokens=12, temperature=0.0)
    cached = continue_prompts(model, PROMPTS, greedy)
    uncached = continue_prompts(model, PROMPTS, GenerationSettings(max_new_tokens=12, temperature=0.0, use_cache=False))
    assert cached == uncached
    assert [len(row) for row in cached] == [12, 12, 12]
    for prompt, row in zip(PROMPTS, cached, strict=True):  # alone as in company
        assert continue_prompts(model, [prompt], greedy) == [row]


def test_greedy_takes_the_likeliest_token_of_the_whole_sequence():
    model = transformer().eval()
    out = generate(model, torch.tensor([[3, 1, 4]]), GenerationSettings(max_new_tokens=5, temperature=0.0))
    assert out[0, :3].tolist() == [3, 1, 4]
    for end in range(3, 8):
        assert out[0, end] == model(out[:, :end]).logits[0, -1].argmax()


def test_a_seed_decides_and_the_mode_is_put_back():
    model = transformer().train()
    prompt = torch.tensor([[1, 2]])
    rows = [generate(model, prompt, GenerationSettings(max_new_tokens=20, seed=s)).tolist() for s in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert model.training


def test_a_stop_token_ends_its_row_only():
    model = transformer()
    free = continue_prompts(model, PROMPTS, GenerationSettings(max_new_tokens=10))
    stop = free[0][4]
    assert stop not in free[0][:4]
    stopping = GenerationSettings(max_new_tokens=10, stop_token=stop)
    rows = continue_prompts(model, PROMPTS, stopping)
    assert rows == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(rows[0]) == 4
    assert max(len(row) for row in rows) == 10
    prompts = torch.tensor([PROMPTS[0]] * 2)
    out = generate(model, prompts, stopping)
    assert torch.equal(out[:, :3], prompts)
    for row in out[:, 3:].tolist():
        assert row == (row[: row.index(stop)] + [stop] * (len(row) - row.index(stop)) if stop in row else row)


def test_top_k_and_top_p_leave_what_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)

    def drawn(**settings):
        generator = torch.Generator().manual_seed(0)
        return torch.bincount(choose(logits, GenerationSettings(**settings), generator), minlength=4) / 4000

    assert drawn().tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert drawn(top_k=2).tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert drawn(top_p=0.75).tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert drawn(top_p=0.01).tolist() == [1, 0, 0, 0]
    assert drawn(temperature=0.5)[0].item() == pytest.approx(0.25 / 0.365, abs=0.03)
    assert drawn(temperature=0.0).tolist() == [1, 0, 0, 0]


def test_agree_has_the_last_word():
    out = continue_prompts(transformer(), [[1]], GenerationSettings(max_new_tokens=3), agree=lambda t: t * 0 + 7)
    assert out == [[7, 7, 7]]


def test_wrong_uses():
    with pytest.raises(UsageError, match="empty prompt"):
        continue_prompts(transformer(), [[1], []])
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(UsageError):
            GenerationSettings(**wrong)


def test_more_tokens_than_positions_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=41, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UsageError, match="max_new_tokens=13"):
        continue_prompts(model, [[1, 2, 3]], GenerationSettings(max_new_tokens=14))
