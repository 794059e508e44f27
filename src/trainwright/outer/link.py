"""The link between groups: membership and re-forming through torchft, one exchange at a time, retried until it lands.

torchft gives: the lighthouse and its heartbeats (who lives), the quorum (who takes part in the next outer step), the
decision that all ranks of a group make together (`should_commit`), who catches up from whom, and a Gloo process group
that is formed anew for each quorum. Ours is what is sent (formats, error feedback), and that an exchange that breaks is
made again with those that are left, instead of throwing the inner steps away.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]
from torchft import Manager, ProcessGroupGloo

from trainwright.config.outer_schema import OuterConfig
from trainwright.errors import LaunchError, TrainwrightError
from trainwright.optim.outer import decode, payload_bytes
from trainwright.outer.addresses import endpoint, own_address
from trainwright.outer.broken import Broken
from trainwright.outer.header import Header, members
from trainwright.outer.rendezvous import unused_part
from trainwright.outer.transport import Download, SnapshotTransport
from trainwright.torch_private import gloo_backend

_CHUNK_BYTES = 4 << 20
"""A transfer goes in pieces: `outer.timeout` is then silence on the link, whatever the size of the model."""
_RETRY_S = 0.5
_ROUND_TRIPS_S = 30.0
_CONNECT_S = 10.0
_ASK_AGAIN_S = 20.0
"""torchft's ranks do not hear when the lighthouse dies while they wait for a quorum: they ask again after so long."""


@dataclass(frozen=True)
class Place:
    """This rank in its group."""

    group: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class Offer:
    """What a rank brings to an outer step; without a payload it listens."""

    header: Header
    payload: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """An outer step that has landed in every rank of this group."""

    fragment: int
    step: int
    """Inner steps after which it was sent."""
    mean: Tensor
    """Of the outer gradients of those that took part: this rank's slice, fp32 [n]."""
    cursors: Mapping[int, tuple[int, int]]
    """Of those that took part: group -> (step, position in the order of the data)."""
    sent_bytes: int
    time_s: float
    """Of the exchange, the wait for others before it left out."""
    download: Download | None
    """Weights that this group is to catch up with, if it was found to be behind."""


@dataclass(frozen=True)
class Meeting:
    """Groups that listen, all of them: nobody has begun."""

    groups: tuple[int, ...]
    download: Download | None


class _LinkGroup(ProcessGroupGloo):
    """torchft's Gloo group, on the link's interface instead of the one that the host's name resolves to."""

    def __init__(self, address: str, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)
        self._address = address

    def _create_pg(self, store: Any, rank: int, world_size: int) -> Any:
        part = unused_part(store, rank, world_size, self._timeout)
        return gloo_backend(part, rank, world_size, self._timeout, self._address)


class OuterLink:
    """This rank's end of the link. `snapshot` gives what another group needs to catch up; `slice_sizes` the values of
    this rank's slice of each fragment."""

    def __init__(
        self,
        settings: OuterConfig,
        place: Place,
        store: tuple[str, int],
        slice_sizes: Sequence[int],
        snapshot: Callable[[], dict[str, Tensor]],
    ) -> None:
        assert settings.lighthouse is not None, "a group knows its lighthouse"
        self._settings, self._place, self._slice_sizes = settings, place, slice_sizes
        self._downloads: list[Download] = []
        timeout = timedelta(seconds=settings.timeout)
        address = own_address(settings)
        self._group = _LinkGroup(address, timeout)
        self._decide_within = timedelta(seconds=3 * settings.timeout + _ROUND_TRIPS_S)
        try:
            self._manager = Manager(
                pg=self._group,
                load_state_dict=None,
                state_dict=None,
                min_replica_size=settings.min_groups,
                use_async_quorum=False,
                timeout=self._decide_within,
                quorum_timeout=timedelta(seconds=_ASK_AGAIN_S),
                connect_timeout=timeout,
                rank=place.rank,
                world_size=place.world_size,
                store_addr=store[0],
                store_port=store[1],
                lighthouse_addr=f"http://{settings.lighthouse}",
                replica_id=f"group_{place.group}",
                hostname=address,
                checkpoint_transport=SnapshotTransport(address, settings.timeout),
                init_sync=False,
            )
        except Exception as error:
            raise LaunchError(
                f"outer.lighthouse={settings.lighthouse}: {error}",
                "groups meet at a lighthouse that runs",
                "start `trainwright lighthouse` there, and see that the port is open",
            ) from error
        self._manager.register_state_dict_fn("outer", self._downloads.append, snapshot)

    # --- calls of the training loop ---------------------------------------------------------------------------------

    def submit(self, offer: Offer) -> Future[Outcome | Meeting]:
        """Begins an outer step (or listening to one) in the background. Every rank of the group calls it alike, and again
        only when the future is done."""
        future: Future[Outcome | Meeting] = Future()

        def run() -> None:
            try:
                future.set_result(self._until_it_lands(offer))
            except BaseException as error:
                future.set_exception(error)

        # Not from a pool: a pool's threads are waited for at the interpreter's end, and this one may wait for others.
        threading.Thread(target=run, name="trainwright-outer", daemon=True).start()
        return future

    @property
    def rounds(self) -> int:
        """Outer steps that have landed, of all fragments."""
        return int(self._manager.current_step())

    @rounds.setter
    def rounds(self, number: int) -> None:
        self._manager.load_state_dict({"step": number, "batches_committed": 0})

    def close(self) -> None:
        """Leaves: the others go on without this group."""
        with contextlib.suppress(Exception):
            self._group.abort(errored=False)
        self._manager.shutdown(wait=False)

    # --- on the link's thread ---------------------------------------------------------------------------------------

    def _until_it_lands(self, offer: Offer) -> Outcome | Meeting:
        unreachable_since: float | None = None
        broken = Broken(self._settings.patience)
        while True:
            self._downloads.clear()
            try:
                self._manager.start_quorum()
                unreachable_since = None
            except Exception as error:  # torchft's own: the lighthouse is away, or nobody came in time
                self._manager._quorum_future = None  # torchft 0.2 would raise the same error again for ever
                unreachable_since = self._note_unreachable(unreachable_since, error)
                continue
            if self._downloads:
                offer = Offer(_listening(offer.header))  # what it was about to send is of weights that are no more
            found: Outcome | Meeting | None = None
            try:
                if self._manager.errored() is None:
                    found = self._exchange(offer)
            except TrainwrightError:
                raise
            except RuntimeError as error:  # a group has died, or the link
                self._manager.report_error(error)
            trouble = self._manager.errored()
            if isinstance(found, Meeting):
                return found
            if found is None:
                self._group.abort(errored=False)  # the others must not wait for this rank in a broken exchange
            with contextlib.suppress(TimeoutError):  # of a rank of this group that is gone: its launcher sees to that
                if self._manager.should_commit(timeout=self._decide_within) and found is not None:
                    return found
            broken.note(trouble)
            time.sleep(_RETRY_S)

    def _note_unreachable(self, since: float | None, error: Exception) -> float | None:
        """Since when the lighthouse is away; None where it is there, and the others only have not come yet."""
        host, port = endpoint(self._settings)
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_CONNECT_S):
            return None
        time.sleep(_RETRY_S)
        now = time.monotonic()
        since = now if since is None else since
        if now - since > self._settings.patience:
            raise LaunchError(
                f"the lighthouse {self._settings.lighthouse} cannot be reached: {error}",
                f"it is back within outer.patience ({self._settings.patience:g} s)",
                "start `trainwright lighthouse` again at the same address, then the same command",
            ) from error
        return since

    @property
    def _download(self) -> Download | None:
        """What torchft found that this group is to catch up with, in the last quorum."""
        return self._downloads[-1] if self._downloads else None

    def _exchange(self, offer: Offer) -> Outcome | Meeting:
        """With the groups of this quorum. Raises RuntimeError where one of them is gone."""
        rows = self._gather(offer.header.as_tensor().view(torch.uint8))
        headers = [Header.of(row.view(torch.int64)) for row in rows]
        taking_part = members(headers, offer.header)
        if not taking_part:
            return Meeting(tuple(sorted(h.group for h in headers)), self._download)
        start_s = time.monotonic()
        fragment = taking_part[0].fragment
        count, dtype = self._slice_sizes[fragment], self._settings.dtype
        payload = offer.payload
        if payload is None:
            payload = torch.zeros(payload_bytes(count, dtype), dtype=torch.uint8)
        payloads = dict(
            zip((h.group for h in headers if h.takes_part), _of(self._gather(payload), headers), strict=True)
        )
        mean = torch.zeros(count, dtype=torch.float32)
        for header in taking_part:  # in the order of the groups' numbers: the same bits everywhere
            mean += decode(payloads[header.group], count, dtype)
        mean /= len(taking_part)
        cursors = {h.group: (h.step, h.position) for h in taking_part}
        sent = payload.numel() * (len(headers) - 1)
        step = taking_part[0].step
        return Outcome(fragment, step, mean, cursors, sent, time.monotonic() - start_s, self._download)

    def _gather(self, own: Tensor) -> list[Tensor]:
        """`own` (uint8, the same length everywhere) of every group in the quorum, in the quorum's order."""
        size = self._group.size()
        if size == 1:
            return [own]
        whole = [torch.empty_like(own) for _ in range(size)]
        for at in range(0, own.numel(), _CHUNK_BYTES):
            pieces = [part[at : at + _CHUNK_BYTES] for part in whole]
            work = self._group.allgather([pieces], [own[at : at + _CHUNK_BYTES]], AllgatherOptions())
            work.wait()
        return whole


def _of(payloads: Sequence[Tensor], headers: Sequence[Header]) -> list[Tensor]:
    return [payload for payload, header in zip(payloads, headers, strict=True) if header.takes_part]


def _listening(header: Header) -> Header:
    return Header(header.group, False, -1, -1, -1, -1, header.world_size, header.layout, header.settings)
