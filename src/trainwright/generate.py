"""Continues prompts with a language model, token by token.

Works on our models, on Hugging Face's causal ones, and on both when sharded: then it is collective, every rank calls it
with the same prompts and settings, and `agree` makes sure that all take the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainwright.errors import UsageError


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen. temperature 0: the likeliest. top_k 0 and top_p 1: no limit (nucleus sampling, Holtzman
    et al., arXiv 1904.09751). stop_token ends a sequence and is not part of it."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token: int | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {self.max_new_tokens}", "at least 1", "max_new_tokens=128")
        if self.temperature < 0:
            raise UsageError(f"temperature {self.temperature}", "at least 0", "temperature=0.8, or 0 for greedy")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}", "at least 0 (0: no limit)", "top_k=50")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}", "0 < top_p <= 1", "top_p=0.9")


def generate(
    model: nn.Module,
    prompts: Int[Tensor, "B T"],
    settings: GenerationSettings | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Int[Tensor, "B S"]:
    """The prompts with their continuations, S <= T + max_new_tokens; a row that stopped early is filled up with the
    stop token. Prompts of one length, on the device that computes; see `continue_prompts`."""
    settings = settings or GenerationSettings()
    rows = continue_prompts(model, prompts.tolist(), settings, prompts.device, agree)
    width = max(len(row) for row in rows)
    fill = settings.stop_token or 0
    new = [row + [fill] * (width - len(row)) for row in rows]
    continuation = torch.tensor(new, dtype=prompts.dtype, device=prompts.device).view(len(rows), width)
    return torch.cat((prompts, continuation), dim=1)


@torch.no_grad()
def continue_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    device: torch.device | str | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, without the prompt.

    prompts: token ids, of any lengths from 1; the shorter ones start to be continued while the longer are still read.
    device: where the model computes (default: where its parameters are). agree: makes the chosen tokens [B] the same on
    all ranks, such as a broadcast from rank 0. The model is left in the mode (train or eval) that it was in.
    Errors: UsageError for an empty prompt, or for more tokens than the model has positions.
    """
    settings = settings or GenerationSettings()
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UsageError("an empty prompt", "a model continues at least one token", "the end-of-text token as prompt")
    total = max(lengths) + settings.max_new_tokens
    _check_positions(model, total, max(lengths))
    target = torch.device(device) if device is not None else next(model.parameters()).device
    tokens = torch.zeros(len(prompts), total, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(list(prompt))
    last = torch.tensor(lengths) + settings.max_new_tokens  # [B] where each row ends
    generator = torch.Generator().manual_seed(settings.seed)
    step = _Stepper(model, len(prompts), total, settings.use_cache)
    starts = torch.tensor(lengths)
    with _evaluating(model):
        position, begin = min(lengths), 0
        while position < total and bool((last > position).any()):
            logits = step(tokens[:, begin:position].to(target)).float().cpu()  # [B, V]
            chosen = choose(logits, settings, generator)
            chosen = chosen if agree is None else agree(chosen)
            # Rows whose prompt reaches further keep their own token.
            tokens[:, position] = torch.where(starts > position, tokens[:, position], chosen)
            if settings.stop_token is not None:
                stopped = (chosen == settings.stop_token) & (starts <= position) & (last > position)
                last = torch.where(stopped, position, last)
            begin = position if settings.use_cache else 0
            position += 1
    return [
        tokens[row, start:end].tolist() for row, (start, end) in enumerate(zip(lengths, last.tolist(), strict=True))
    ]


def choose(logits: Float[Tensor, "B V"], settings: GenerationSettings, generator: torch.Generator) -> Int[Tensor, " B"]:
    """The next token of each row: the likeliest at temperature 0, else drawn from what top_k and top_p leave."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if settings.top_k:
        kth = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while those before it have not reached top_p: the likeliest always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


class _Stepper:
    """Feeds tokens and returns the logits after the last one; keeps the model's cache between calls."""

    def __init__(self, model: nn.Module, batch: int, max_length: int, use_cache: bool) -> None:
        self._model, self._use_cache = model, use_cache
        new_cache: Any = getattr(model, "new_cache", None)
        self._ours = new_cache is not None
        self._cache: Any = new_cache(batch, max_length) if self._ours and use_cache else None

    def __call__(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        if self._ours:
            return self._model(input_ids, cache=self._cache).logits[:, -1]
        if not self._use_cache:
            return self._model(input_ids=input_ids, use_cache=False).logits[:, -1]
        out = self._model(input_ids=input_ids, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        return out.logits[:, -1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_positions(model: nn.Module, total: int, longest_prompt: int) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder model",
            "this continues prompts of causal models",
            "the model's own method: engine.module.generate(input_ids, max_new_tokens=128)",
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and total > limit:
        room = limit - longest_prompt
        raise UsageError(
            f"{longest_prompt} prompt tokens and {total - longest_prompt} new ones for a model of {limit} positions",
            "the model has a position for every token",
            f"max_new_tokens={room}" if room > 0 else f"a prompt of at most {limit - 1} tokens",
        )
