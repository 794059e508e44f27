"""Schedule, fragments, what the groups tell each other, the snapshot's way, and what is refused before anything starts."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from trainwright.config import load_config
from trainwright.data.plan import plan_batches, share_of_group
from trainwright.errors import CheckpointError, ConfigError, ContradictionError, LaunchError
from trainwright.optim.groups import shard_parameters
from trainwright.optim.outer import BLOCK
from trainwright.outer import broken as broken_exchanges
from trainwright.outer import check_installed
from trainwright.outer.broken import Broken
from trainwright.outer.fragments import Fragment, fragments_of, share_out, unit_of
from trainwright.outer.header import Header, members
from trainwright.outer.schedule import Schedule
from trainwright.outer.transport import SnapshotTransport


@pytest.mark.parametrize(("every", "fragments"), [(50, 1), (7, 3), (10, 4), (1, 1), (5, 5)])
def test_every_fragment_is_sent_once_in_so_many_steps_and_evenly_apart(every: int, fragments: int) -> None:
    schedule = Schedule(every, fragments, 0)
    sent = [(s, f) for s in range(4 * every + 1) if (f := schedule.fragment_sent_after(s)) is not None]
    assert sent == [((k + 1) * every // fragments, k % fragments) for k in range(4 * fragments)]


def test_units_are_blocks_and_lone_modules() -> None:
    assert unit_of("layers.11.attention.query.weight") == "layers.11"
    assert unit_of("model.layers.0.mlp.up_proj.weight") == "model.layers.0"
    assert unit_of("embedding.weight") == "embedding"
    assert unit_of("head") == ""


def test_fragments_are_whole_units_of_like_size_each_once() -> None:
    sizes = {"embedding.weight": 900} | {f"layers.{i}.{n}.weight": 100 for i in range(6) for n in ("up", "down")}
    sizes["norm.weight"] = 8
    shares = share_out(sizes, 3)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    owner = {name: index for index, share in enumerate(shares) for name in share}
    for name in sizes:
        assert owner[name] == owner[next(n for n in sizes if unit_of(n) == unit_of(name))]
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 300
    with pytest.raises(ContradictionError, match=r"outer\.fragments=8"):
        share_out(sizes, 9)


def test_a_fragment_reads_and_writes_its_shards_in_whole_blocks() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 300))
    shards = shard_parameters(list(model.named_parameters()))
    fragment = Fragment.of(shards, slices=2, index=1)
    assert all(offset % BLOCK == 0 for offset in fragment.offsets)
    assert fragment.size % (2 * BLOCK) == 0
    flat = fragment.read()
    for offset, shard in zip(fragment.offsets, shards, strict=True):
        assert torch.equal(flat[offset : offset + shard.local.numel()], shard.local.detach().flatten())
    assert torch.equal(fragment.own_slice(flat), flat[fragment.size // 2 :])
    fragment.write(flat + 1)
    torch.testing.assert_close(fragment.read().sum(), flat.sum() + sum(p.numel() for p in model.parameters()))
    other = fragments_of(shards, 2, slices=1, index=0)
    assert {f.fingerprint() for f in other}.isdisjoint({fragment.fingerprint()})


OWN = Header(0, True, 0, 10, 160, 5, 1, 6, 7)


def test_a_header_comes_back_from_its_row() -> None:
    row = OWN.as_tensor()
    assert row.dtype == torch.int64
    assert row.numel() == Header.length()
    assert Header.of(row) == OWN
    row[0] = 99
    with pytest.raises(ConfigError, match="version 99"):
        Header.of(row)


def test_those_that_take_part_stand_in_the_order_of_their_numbers() -> None:
    listens = Header(2, False, -1, -1, -1, -1, 1, 6, 7)
    other = replace(OWN, group=1)
    assert members([listens, other, OWN], OWN) == [OWN, other]
    assert members([listens, replace(listens, group=0)], listens) == []


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"settings": 8}, ContradictionError, "differ in `outer`"),
        ({"layout": 8}, ContradictionError, "other shards"),
        ({"world_size": 2}, ContradictionError, "1 and 2 ranks"),
        ({"step": 11}, ContradictionError, "after step 11"),
        ({"weights": 6}, CheckpointError, "other synchronised weights"),
        ({"group": 0}, ConfigError, "two launches that are both outer.group=0"),
    ],
)
def test_groups_that_cannot_average_are_told_why(change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        members([OWN, replace(OWN, **{"group": 1, **change})], OWN)


def test_a_group_that_listens_and_does_not_fit_stops_itself_alone() -> None:
    wrong = Header(2, False, -1, -1, -1, -1, 1, 99, 7)
    assert members([OWN, wrong], OWN) == [OWN]
    with pytest.raises(ContradictionError, match="groups 0 and 2 hold the model in other shards"):
        members([OWN, wrong], wrong)


def test_a_snapshot_is_waited_for_and_fetched_in_the_background() -> None:
    sender, receiver = SnapshotTransport("127.0.0.1", 10.0), SnapshotTransport("127.0.0.1", 10.0)
    try:
        limit = timedelta(seconds=1)
        got = receiver.recv_checkpoint(0, sender.metadata(), 7, limit)  # asked before it is taken
        assert got["torchft"] == {"step": 7, "batches_committed": 0}
        download = got["user"]["outer"]
        assert not download.done
        weights = {"weights.0": torch.arange(5.0)}
        sender.send_checkpoint([1], 7, {"user": {"outer": weights}}, limit)
        weights["weights.0"] += 1  # the snapshot is a copy
        assert torch.equal(download.result()["weights.0"], torch.arange(5.0))
        gone = receiver.recv_checkpoint(0, sender.metadata(), 6, limit)["user"]["outer"]
        with pytest.raises(CheckpointError, match="404"):
            gone.result()
        assert gone.failed
    finally:
        sender.shutdown()
        receiver.shutdown()
    refused = receiver.recv_checkpoint(0, "127.0.0.1:1", 7, timedelta(seconds=1))["user"]["outer"]
    until_s = time.monotonic() + 10
    while refused.failed is None and time.monotonic() < until_s:
        time.sleep(0.01)
    assert "refused" in refused.failed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["outer.lr=0.5"], "outer.lr with outer.groups=1"),
        (["outer.groups=2", "outer.group=2"], "counted from 0"),
        (["outer.groups=2", "outer.group=1"], "without outer.lighthouse"),
        (["outer.groups=2", "outer.min_groups=3"], "min_groups=3"),
        (["outer.groups=2", "outer.every=4", "outer.delay=4"], "delay is less than"),
        (["outer.groups=2", "outer.every=1"], "outer.overlap=false"),
        (["outer.groups=2", "outer.overlap=false", "outer.delay=3"], "applied at once"),
        (["outer.groups=2", "outer.overlap=false", "outer.correction=mix"], "applied at once"),
        (["outer.groups=2", "outer.mixing=0.5"], "correction=mix"),
        (["outer.groups=2", "outer.every=4", "outer.fragments=5"], "one fragment at most"),
        (["outer.groups=2", "batch.global_size=5"], "batch.global_size=4"),
        (["outer.groups=2", "duration=3m"], "another horizon"),
        (["outer.groups=2", "offload.optimizer=disk"], "masters that lie in the model"),
        (["outer.groups=2", "precision=fp64"], "made in fp32"),
    ],
)
def test_contradictions_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ContradictionError, match=said):
        load_config(None, settings)


def test_groups_share_the_global_batch_equally() -> None:
    batch = load_config(None, ["outer.groups=2", "batch.global_tokens=1024", "data.sequence_length=64"]).config.batch
    assert plan_batches(share_of_group(batch, 64, 2), 64, 2).global_size == 8
    assert share_of_group(batch, 64, 1) is batch


def test_without_torchft_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'trainwright\[slow-links\]'"):
        check_installed()


def test_a_link_that_never_forms_is_said_and_then_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(patience_s=0.0)
    for _ in range(broken_exchanges._ONCE_MORE):  # what one dead group costs is no reason to end
        broken.note(RuntimeError("connection refused"))
    with pytest.raises(LaunchError, match=r"connection refused[^$]*outer.address"):
        broken.note(None)
    monkeypatch.setattr(broken_exchanges, "_SAY_AFTER_S", -1.0)
    patient = Broken(patience_s=100.0)
    with pytest.warns(UserWarning, match=r"the lighthouse is there, but .*a rank of this group.*100 s"):
        patient.note(None)
    for _ in range(5):
        patient.note(None)  # once
