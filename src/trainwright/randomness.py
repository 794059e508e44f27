"""Dropout as a pure function of where a forward stands, never of what ran before: any step can be replayed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.data.batch import Batch
from trainwright.mesh import Mesh
from trainwright.models.build import is_ours
from trainwright.models.dropout import dropout_context


class Randomness(Protocol):
    """A context for the forward of one micro-batch, number `forward` of its step; `inputs` are the micro-batch or None.

    step: a tensor in a step that is captured to be replayed, where nothing may be drawn from torch's generators.
    """

    watches: bool
    """Whether it looks at them."""
    drawn: bool
    """Whether a forward has been seen to draw from them."""

    def __call__(self, step: int | Tensor, forward: int, inputs: Any) -> AbstractContextManager[Any]: ...


def randomness_of(module: nn.Module, seed: int, mesh: Mesh) -> Randomness:
    """The one that suits the model."""
    return PureDropout(seed, mesh) if is_ours(module) else SeededByPlace(seed, mesh)


class _Watch:
    """Looks whether forwards draw from torch's generators, where that is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [torch.cuda.current_device()] if device.type == "cuda" else []
        self.watches = self.drawn = False

    @contextlib.contextmanager
    def _watching(self, step: int | Tensor) -> Iterator[None]:
        looks = self.watches and not isinstance(step, Tensor)  # inside a capture generators cannot be asked
        before = self._states() if looks else []
        yield
        self.drawn |= looks and before != self._states()

    def _states(self) -> list[bytes]:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
        return [state.numpy().tobytes() for state in states]


class PureDropout(_Watch):
    """Our models: dropout as a function of (seed, step, sample, layer).

    Without the samples' numbers (a user's own batches): of (seed, step, rank, forward in the step, row, layer).
    """

    def __init__(self, seed: int, mesh: Mesh) -> None:
        super().__init__(mesh.device)
        self._seed = seed
        self._rank = mesh.data_parallel_rank

    @contextlib.contextmanager
    def __call__(self, step: int | Tensor, forward: int, inputs: Any) -> Iterator[None]:
        if isinstance(inputs, Batch):
            keys = dropout_context(self._seed, step, inputs.sample_ids)
        else:
            place = 1 + (self._rank << 20) + forward
            keys = dropout_context(self._seed + (place << 32), step, None)
        with self._watching(step), keys:
            yield


class SeededByPlace(_Watch):
    """Other models: torch's generators seeded by (seed, step, forward in the step, mesh coordinate), and put
    back after. Tensor ranks compute on the same activations and draw alike; a pipeline's parts see to themselves."""

    def __init__(self, seed: int, mesh: Mesh) -> None:
        super().__init__(mesh.device)
        self._seed = seed
        self._rank = mesh.data_parallel_rank + mesh.data_parallel_size * mesh.coordinate("context")

    @contextlib.contextmanager
    def __call__(self, step: int | Tensor, forward: int, inputs: Any) -> Iterator[None]:
        if isinstance(step, Tensor):
            yield
            return
        key = f"{self._seed}/{step}/{forward}/{self._rank}".encode()
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)
            with self._watching(step):
                yield
