"""State of a generation: keys and values of attention, or an LSTM's hidden states."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from trainwright.errors import UsageError


class KeyValueCache:
    """Keys and values of all layers, allocated once at the first token's dtype and device.

    `length` counts the tokens held; the model advances it after its last layer.
    """

    def __init__(self, layers: int, batch: int, max_length: int) -> None:
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def append(
        self, layer: int, keys: Float[Tensor, "B G T E"], values: Float[Tensor, "B G T E"]
    ) -> tuple[Float[Tensor, "B G S E"], Float[Tensor, "B G S E"]]:
        """Stores T new positions of a layer; returns all S = length + T."""
        end = self.length + keys.shape[2]
        if end > self.max_length or keys.shape[0] != self.batch:
            raise UsageError(
                f"{keys.shape[0]} sequences up to position {end} for a cache of {self.batch} x {self.max_length}",
                "a cache holds what it was made for",
                f"model.new_cache({keys.shape[0]}, {end})",
            )
        old_keys, old_values = self._keys[layer], self._values[layer]
        if old_keys is None or old_values is None:
            shape = (self.batch, keys.shape[1], self.max_length, keys.shape[3])
            old_keys = self._keys[layer] = keys.new_empty(shape)
            old_values = self._values[layer] = values.new_empty(shape)
        old_keys[:, :, self.length : end] = keys
        old_values[:, :, self.length : end] = values
        return old_keys[:, :, :end], old_values[:, :, :end]


class RecurrentState:
    """(h, c), each [1, B, hidden], of each LSTM layer; None before the first token. `length` counts tokens."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.states: list[tuple[Tensor, Tensor] | None] = [None] * layers
