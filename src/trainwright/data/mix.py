"""Several token data sets as one: each gives its share of the samples, and the order stays a pure function of the position.

Positions are dealt out in blocks of `_BLOCK`: in each, a set has as many places as its weight says (largest remainders), at
places that a permutation of the block chooses (`order.permute`). So the share holds in every block, the number of a set's
samples before any position is known without counting from the start, and a set goes through its own epochs in its own
order, however often the others come round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainwright import storage
from trainwright.config.data_schema import DataConfig
from trainwright.data.order import Indices, Order, SampleOrder, permute
from trainwright.data.shards import Mask, SplitName, TokenDataset, Tokens, TokenSplit
from trainwright.errors import DataError

__all__ = ["MixedDataset", "MixedOrder", "open_dataset"]

_BLOCK = 4096


def open_dataset(config: DataConfig) -> TokenDataset:
    """The data set that `data.path` names, or those of `data.mix` as one. Raises DataError, also where their tokenizers
    differ."""
    if config.path is not None:
        return TokenDataset.open(config.path, config.cache)
    sets = [TokenDataset.open(entry.path, config.cache) for entry in config.mix]
    return MixedDataset(sets, [entry.weight for entry in config.mix])


class MixedDataset(TokenDataset):
    """Data sets of one tokenizer, with weights (None: as their sizes are)."""

    def __init__(self, sets: Sequence[TokenDataset], weights: Sequence[float | None]) -> None:
        assert sets, "the config's check asks for a set"
        self.sets, self.path, self.manifest = tuple(sets), sets[0].path, sets[0].manifest
        for other in sets[1:]:
            if other.manifest.tokenizer.sha256 != self.manifest.tokenizer.sha256:
                raise DataError(
                    f"{other.path} and {self.path} have different tokenizers",
                    "the sets of a mix have one vocabulary",
                    f"trainwright prepare SOURCE --out DIR --tokenizer {self.tokenizer_path}",
                )
        self.weights = tuple(weights)

    @property
    def version(self) -> str:
        """SHA-256 over the sets' versions and weights."""
        content = [[s.version, w] for s, w in zip(self.sets, self.weights, strict=True)]
        return storage.sha256_bytes(storage.canonical_json({"mix": content}))

    def split(self, name: SplitName) -> TokenSplit:
        """`train`, mixed by weight, or `held_out`, one set after the other."""
        parts = [dataset.split(name) for dataset in self.sets]
        if name == "train":
            return MixedSplit(parts, self.weights, self.version)
        return JoinedSplit(parts, self.version)

    def document_name(self, number: int) -> str:
        """As TokenDataset's; documents are numbered through, one set after the other."""
        for dataset in self.sets:
            count = sum(shard.num_documents for shard in dataset.manifest.shards)
            if number < count:
                return f"{dataset.path.name}: {dataset.document_name(number)}"
            number -= count
        return str(number)


class JoinedSplit(TokenSplit):
    """Splits one after the other, as one stream."""

    def __init__(self, parts: Sequence[TokenSplit], version: str) -> None:
        self.parts = tuple(parts)
        self.name, self.version, self.vocab_size = parts[0].name, version, parts[0].vocab_size
        self._starts = np.cumsum([0, *(part.num_tokens for part in parts)])
        self._documents = np.cumsum([0, *(part.documents_of_set for part in parts)])

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def num_counted(self) -> int:
        return sum(part.num_counted for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_documents(self) -> int:
        return sum(part.num_documents for part in self.parts)

    def read(self, start: int, length: int) -> tuple[Tokens, Mask | None, Tokens]:
        """As TokenSplit's; across the ends of the parts."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise ValueError(f"[{start}, {start + length}) is not inside the {self.num_tokens} tokens of {self.name}")
        pieces = []
        for number, part in enumerate(self.parts):
            first, last = int(self._starts[number]), int(self._starts[number + 1])
            if first < start + length and start < last:
                begin = max(start, first)
                tokens, mask, documents = part.read(begin - first, min(start + length, last) - begin)
                pieces.append((tokens, mask, documents + self._documents[number]))
        if len(pieces) == 1:
            return pieces[0]
        masked = any(mask is not None for _, mask, _ in pieces)
        masks = [np.ones(len(t), np.uint8) if m is None else m for t, m, _ in pieces]
        tokens, documents = (np.concatenate([piece[i] for piece in pieces] or [np.empty(0, np.int64)]) for i in (0, 2))
        return tokens, np.concatenate(masks) if masked else None, documents


class MixedSplit(JoinedSplit):
    """Training splits by weight. Samples are numbered through: those of the first set, then those of the second."""

    def __init__(self, parts: Sequence[TokenSplit], weights: Sequence[float | None], version: str) -> None:
        super().__init__(parts, version)
        self.weights = weights

    def _counts(self, sequence_length: int) -> list[int]:
        return [part.num_sequences(sequence_length) for part in self.parts]

    def num_sequences(self, sequence_length: int) -> int:
        """Of all sets together: an epoch of the mix is as many samples, though not each of them once. Raises DataError for
        a set without a whole sequence."""
        counts = self._counts(sequence_length)
        if 0 in counts:
            raise DataError(
                f"set {counts.index(0) + 1} of the mix has no whole sequence of {sequence_length:,} tokens",
                "every set of a mix gives samples",
                "a shorter data.sequence_length, or leave it out",
            )
        return sum(counts)

    def sequence_start(self, sample: int, sequence_length: int) -> int:
        """Where in the joined stream a sample begins: no sample crosses from one set to the next."""
        for number, count in enumerate(self._counts(sequence_length)):
            if sample < count:
                return int(self._starts[number]) + sample * sequence_length
            sample -= count
        raise ValueError(f"sample {sample} beyond the mix")

    def order(self, sequence_length: int, seed: int, shuffle: bool) -> MixedOrder:
        """The order of training."""
        self.num_sequences(sequence_length)
        counts = self._counts(sequence_length)
        weights = [float(c if w is None else w) for c, w in zip(counts, self.weights, strict=True)]
        versions = [part.version for part in self.parts]
        return MixedOrder(counts, weights, versions, self.version, seed=seed, shuffle=shuffle)


class MixedOrder(Order):
    """The endless sequence of samples of several sets; each set's samples come in its own `SampleOrder`."""

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        versions: Sequence[str],
        version: str,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.stretch = _BLOCK
        self.places = places_by_weight(weights)
        """Of each set in a block."""
        self._ends = np.cumsum(self.places)
        self._offsets = np.cumsum([0, *counts])
        self._version, self._seed = f"mix {version}", seed
        # The same data set twice in a mix is two sets, with an order each.
        self._orders = [
            SampleOrder(count, version=f"{number} {of_set}", seed=seed, shuffle=shuffle)
            for number, (count, of_set) in enumerate(zip(counts, versions, strict=True))
        ]

    def _of_stretch(self, number: int, offset: int, count: int) -> Indices:
        result = np.empty(count, dtype=np.int64)
        sets = self._sets(number)
        for of_set, order in enumerate(self._orders):
            before = number * self.places[of_set] + int((sets[:offset] == of_set).sum())
            mine = np.flatnonzero(sets[offset : offset + count] == of_set)
            result[mine] = order.samples(before, len(mine)) + self._offsets[of_set]
        return result

    def _sets(self, block: int) -> Indices:
        """The set of each place of a block."""
        places = permute(np.arange(_BLOCK), _BLOCK, version=self._version, seed=self._seed, epoch=block)
        return np.searchsorted(self._ends, places, side="right")


def places_by_weight(weights: Sequence[float]) -> list[int]:
    """Places of a block by largest remainders, at least one each. Raises DataError for more sets than places."""
    if len(weights) > _BLOCK:
        raise DataError(f"a mix of {len(weights)} sets", f"a mix has at most {_BLOCK} sets", "join some of them")
    shares = np.array(weights, dtype=np.float64) / sum(weights) * _BLOCK
    places = np.maximum(np.floor(shares).astype(np.int64), 1)
    for number in np.argsort(-(shares - np.floor(shares)), kind="stable")[: max(0, _BLOCK - int(places.sum()))]:
        places[number] += 1
    while places.sum() > _BLOCK:
        places[int(places.argmax())] -= 1
    return [int(n) for n in places]
