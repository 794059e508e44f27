"""Whoever waits for the other ranks is ended in time; whoever has met them is left alone."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from trainwright import rendezvous
from trainwright.launcher_variables import read_launch

LAUNCH = read_launch({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes, in the process's place."""
    found: list[int] = []
    monkeypatch.setattr(os, "_exit", found.append)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29499")
    monkeypatch.setattr(rendezvous, "_GRACE_S", 0.2)
    return found


def test_ranks_that_have_met_are_left_alone(ends: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with rendezvous._telling(LAUNCH, timedelta(seconds=0.2)):
        pass
    time.sleep(0.8)
    assert ends == []
    assert capsys.readouterr().err == ""


def test_a_rank_that_waits_too_long_leaves_its_reason(
    ends: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    print("what was printed before", end="")
    with rendezvous._telling(LAUNCH, timedelta(seconds=0.2)):
        for _ in range(200):
            if ends:
                break
            time.sleep(0.05)
    assert ends == [1]
    assert "rank 1 of 2 did not meet the others at 127.0.0.1:29499" in capsys.readouterr().err
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["deliberate"]
    assert "did not meet the others" in message["message"]
