"""The data room: text -> versioned token data set -> batches in an order that can be computed.

    prepare(SOURCES, OUT)  ->  TokenDataset.open(OUT).split("train")  ->  TokenLoader(...)  ->  Batch

Names are imported when they are first used: `prepare` needs no torch, and training needs no readers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright.data.batch import Batch as Batch
    from trainwright.data.batch import BatchPlan as BatchPlan
    from trainwright.data.loader import TokenLoader as TokenLoader
    from trainwright.data.loader import eval_batches as eval_batches
    from trainwright.data.order import SampleOrder as SampleOrder
    from trainwright.data.preparation import PrepareResult as PrepareResult
    from trainwright.data.preparation import prepare as prepare
    from trainwright.data.settings import PrepareSettings as PrepareSettings
    from trainwright.data.shards import TokenDataset as TokenDataset
    from trainwright.data.shards import TokenSplit as TokenSplit
    from trainwright.data.shards import check as check
    from trainwright.data.shards import describe as describe
    from trainwright.data.tokenize import TextTokenizer as TextTokenizer
    from trainwright.data.tokenize import load_tokenizer as load_tokenizer

_HOMES = {
    "Batch": "batch",
    "BatchPlan": "batch",
    "PrepareResult": "preparation",
    "PrepareSettings": "settings",
    "SampleOrder": "order",
    "TextTokenizer": "tokenize",
    "TokenDataset": "shards",
    "TokenLoader": "loader",
    "TokenSplit": "shards",
    "check": "shards",
    "describe": "shards",
    "eval_batches": "loader",
    "load_tokenizer": "tokenize",
    "prepare": "preparation",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
