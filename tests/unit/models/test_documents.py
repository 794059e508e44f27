"""Documents packed into a sequence, kept apart: the loss is that of each document on its own."""

from __future__ import annotations

import pytest
import torch

import trainwright as tw
from small import transformer, with_values
from trainwright.data.batch import Batch
from trainwright.data.loader import document_positions
from trainwright.errors import ModelError
from trainwright.micro_batches import micro_batch_loss
from trainwright.models.lstm import LstmLanguageModel, LstmSettings

LENGTHS = ((3, 1, 4), (5, 3))


def _packed():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 37, (2, 8), generator=generator)
    labels = torch.randint(0, 37, (2, 8), generator=generator)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
    return tokens, labels, documents


def _models():
    yield "transformer", lambda: with_values(transformer)
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 37, "pad_token_id": 0}
    llama = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    yield "llama", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **sizes))
    gpt2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
    yield "gpt2", lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **sizes))


def test_positions_start_again_with_each_document():
    assert document_positions(_packed()[2]).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2]]


@pytest.mark.parametrize(("kind", "build"), list(_models()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_packed_sequence_is_its_documents_one_by_one(kind, build):
    torch.manual_seed(0)
    model = build().double().eval()
    tokens, labels, documents = _packed()
    batch = Batch(tokens, labels, documents, torch.arange(2), 0, document_positions(documents))
    found = micro_batch_loss(model, batch).sum.item()
    alone = 0.0
    for row, lengths in enumerate(LENGTHS):
        for part, target in zip(tokens[row].split(lengths), labels[row].split(lengths), strict=True):
            one = Batch(part[None], target[None], None, torch.arange(1), 0)
            alone += micro_batch_loss(model, one).sum.item()
    crossing = micro_batch_loss(model, Batch(tokens, labels, documents, torch.arange(2), 0)).sum.item()
    assert found == pytest.approx(alone, rel=1e-6)
    assert crossing != pytest.approx(alone, rel=1e-4), "without the mask attention crosses documents"


def test_a_model_that_cannot_keep_documents_apart_is_refused():
    def build():
        return LstmLanguageModel(LstmSettings(37, 12, 12, layers=1))

    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "vocab_size": 37,
    }
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    for model in (build, masked):
        with pytest.raises(ModelError, match="recurrent"):
            tw.initialize(model=model, config={"data": {"document_mask": True}})
