"""The link by itself, both groups in one process: outer steps, a group that goes and comes back, a lighthouse that dies."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]

from trainwright.config.outer_schema import OuterConfig
from trainwright.errors import LaunchError
from trainwright.optim.outer import BLOCK, encode
from trainwright.outer.header import Header
from trainwright.launcher_variables import free_port
from trainwright.outer.link import Meeting, Offer, OuterLink, Outcome, Place, _LinkGroup
from trainwright.outer.rendezvous import unused_part

SIZE = 4 * BLOCK
LISTENS = Header(0, False, -1, -1, -1, -1, 1, 6, 7)


class _Lighthouse:
    """`trainwright lighthouse`: a process of its own, to be killed."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, "-m", "trainwright.cli", "lighthouse", "--bind", address, "--heartbeat-timeout", "3"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert b"lighthouse on" in self._process.stdout.readline()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def _link(group: int, address: str) -> Iterator[OuterLink]:
    settings = OuterConfig(groups=2, group=group, lighthouse=address, dtype="fp32", timeout=10, patience=240)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    weights = {"weights.0": torch.full((SIZE,), float(group))}
    link = OuterLink(settings, Place(group, 0, 1), ("127.0.0.1", store.port), [SIZE], lambda: weights)
    try:
        yield link
    finally:
        link.close()


def _offer(group: int, step: int, value: float) -> Offer:
    header = Header(group, True, 0, step, 8 * step, 5, 1, 6, 7)
    return Offer(header, encode(torch.full((SIZE,), value), "fp32"))


def _together(links: list[OuterLink], offers: list[Offer]) -> list[Any]:
    futures = [link.submit(offer) for link, offer in zip(links, offers, strict=True)]
    return [future.result(timeout=60) for future in futures]


def _meet(links: list[OuterLink]) -> None:
    for _ in range(50):
        found = _together(links, [Offer(replace(LISTENS, group=g)) for g in range(2)])
        if all(isinstance(one, Meeting) and one.groups == (0, 1) for one in found):
            return
    raise AssertionError("the groups never met")


def test_groups_average_lose_one_take_it_back_and_outlive_the_lighthouse() -> None:
    address = f"127.0.0.1:{free_port()}"
    server = _Lighthouse(address)
    try:
        with _link(0, address) as first:
            with _link(1, address) as second:
                _meet([first, second])
                for outcome in _together([first, second], [_offer(0, 5, 1.0), _offer(1, 5, 4.0)]):
                    assert isinstance(outcome, Outcome)
                    assert torch.equal(outcome.mean, torch.full((SIZE,), 2.5))
                    assert outcome.cursors == {0: (5, 40), 1: (5, 40)}
                    assert outcome.sent_bytes == 4 * SIZE
                # The second goes away in the middle of an outer step.
                alone = first.submit(_offer(0, 10, 3.0))
            outcome = alone.result(timeout=60)
            assert isinstance(outcome, Outcome)
            assert torch.equal(outcome.mean, torch.full((SIZE,), 3.0))
            assert first.rounds == 2
            with _link(1, address) as second:
                listening = second.submit(Offer(replace(LISTENS, group=1)))
                time.sleep(2.0)  # a group that is there does not wait for one that has not asked
                own, other = first.submit(_offer(0, 15, 2.0)).result(timeout=60), listening.result(timeout=60)
                assert own.download is None
                assert other.cursors == {0: (15, 120)}
                assert torch.equal(other.mean, own.mean)  # it listens, and counts for nothing
                assert torch.equal(other.download.result()["weights.0"], torch.zeros(SIZE))
                assert second.rounds == first.rounds == 3
                server.kill()
                futures = [first.submit(_offer(0, 20, 1.0)), second.submit(_offer(1, 20, 2.0))]
                server = _Lighthouse(address)
                for future in futures:
                    assert torch.equal(future.result(timeout=240).mean, torch.full((SIZE,), 1.5))
    finally:
        server.kill()


@pytest.mark.parametrize("late", [0, 1])
def test_a_quorum_number_that_comes_again_finds_no_old_address(late: int) -> None:
    """A lighthouse started again counts its quorums from one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    groups = [_LinkGroup("127.0.0.1", timedelta(seconds=10)) for _ in range(2)]

    def form(rank: int, after_s: float) -> None:
        time.sleep(after_s)
        groups[rank].configure(f"127.0.0.1:{store.port}/torchft/1/0", f"group_{rank}", rank, 2)

    for delay_s in (0.0, 0.5, 0.5):  # the earlier rank reads what the late one left the time before
        threads = [threading.Thread(target=form, args=(rank, delay_s * (rank == late))) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        own = [torch.full((2,), float(rank)) for rank in range(2)]
        got = [[torch.zeros(2), torch.zeros(2)] for _ in range(2)]
        works = [groups[rank].allgather([got[rank]], [own[rank]], AllgatherOptions()) for rank in range(2)]
        for work in works:
            work.wait()
        assert all(torch.equal(got[rank][other], own[other]) for rank in range(2) for other in range(2))
    for group in groups:
        group.abort(errored=False)


def test_a_rank_that_does_not_come_is_not_waited_for() -> None:
    with pytest.raises(TimeoutError, match="not every group of the quorum came within"):
        unused_part(dist.HashStore(), 0, 2, timedelta(seconds=0.2))
    with pytest.raises(TimeoutError):
        unused_part(dist.HashStore(), 1, 2, timedelta(seconds=0.2))


def test_a_lighthouse_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchError, match=r"outer\.lighthouse=127\.0\.0\.1:1:"), _link_quick():
        pass


@contextmanager
def _link_quick() -> Iterator[OuterLink]:
    settings = OuterConfig(groups=2, group=0, lighthouse="127.0.0.1:1", timeout=1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    yield OuterLink(settings, Place(0, 0, 1), ("127.0.0.1", store.port), [SIZE], dict)
