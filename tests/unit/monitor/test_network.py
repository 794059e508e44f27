"""Bytes that a machine sends, as its interfaces count them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.monitor import network

DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 9999       10    0    0    0     0          0         0     9999      10    0    0    0     0       0          0
  eth0: 1000       10    0    0    0     0          0         0     2000      10    0    0    0     0       0          0
  eth1:1000       10    0    0    0     0          0         0     30      10    0    0    0     0       0          0
"""


def test_all_interfaces_but_the_loopback_count(tmp_path: Path) -> None:
    (tmp_path / "dev").write_text(DEV)
    assert network.sent_bytes(tmp_path / "dev", tmp_path / "none") == 2030
    counters = tmp_path / "ib" / "mlx5_0" / "ports" / "1" / "counters"
    counters.mkdir(parents=True)
    (counters / "port_xmit_data").write_text("25\n")
    assert network.sent_bytes(tmp_path / "dev", tmp_path / "ib") == 2130
    assert network.sent_bytes(tmp_path / "absent", tmp_path / "ib") is None


def test_a_step_is_what_was_sent_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = network.SentBytes()
    assert sent.step() is None  # one machine alone
    monkeypatch.setattr(sent, "_counts", True)
    totals = iter([100, 150, 150, None, 400, 450])
    monkeypatch.setattr(network, "sent_bytes", lambda: next(totals))
    assert [sent.step() for _ in range(6)] == [None, 50, 0, None, None, 50]
