"""Where groups leave their addresses for one another: a part of the store that nobody has used before.

torchft numbers quorums, and addresses are left under the quorum's number. A lighthouse that was started again counts
from one: under these numbers lie the addresses of connections that are long closed, and a group that reads one of them
connects to nothing. So those that meet agree on a name of their own first.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_LOOK_AGAIN_S = 0.02


def unused_part(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """The part of `store` under a name that rank 0 made up just now: the same for all `size` ranks that call it, whatever
    earlier calls (of ranks that are gone, too) left in it. Raises TimeoutError."""
    if size == 1:
        return store
    return PrefixStore(_offer(store, size, timeout) if rank == 0 else _answer(store, rank, timeout), store)


def _offer(store: Store, size: int, timeout: timedelta) -> str:
    """Rank 0: gives the name to whoever asks, until all have it. What a dead rank asked is given a name as well, and the
    name taken back when its successor asks."""
    name, told = uuid.uuid4().hex, list[str]()

    def all_know() -> str | None:
        nonlocal told
        asked = [f"ask/{rank}" for rank in range(1, size)]
        tokens = [store.get(key).decode() if store.check([key]) else "" for key in asked]
        if tokens != told:
            told = tokens
            store.set("name", json.dumps([name, *tokens]))
        return name if store.check([f"{name}/known/{rank}" for rank in range(1, size)]) else None

    return _until(all_know, timeout)


def _answer(store: Store, rank: int, timeout: timedelta) -> str:
    """Another rank: asks with a token of this call, and takes the name that comes with that token."""
    token = uuid.uuid4().hex
    store.set(f"ask/{rank}", token)

    def told() -> str | None:
        if not store.check(["name"]):
            return None
        name, *tokens = json.loads(store.get("name"))
        if len(tokens) < rank or tokens[rank - 1] != token:
            return None
        store.set(f"{name}/known/{rank}", "yes")
        return str(name)

    return _until(told, timeout)


def _until(found: Callable[[], str | None], timeout: timedelta) -> str:
    deadline = time.monotonic() + timeout.total_seconds()
    while (name := found()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not every group of the quorum came within {timeout.total_seconds():g} s")
        time.sleep(_LOOK_AGAIN_S)
    return name
