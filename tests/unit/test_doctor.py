"""doctor: findings with remedies, a broken check does not hide the others, and the two-rank self-test is real."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trainwright import doctor
from trainwright.doctor_net import Pair, _judge, which_pairs
from trainwright.findings import Finding


def test_everything_is_looked_at(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in doctor.examine(tmp_path / "not" / "yet", self_test=False)}
    expected = "Python PyTorch Processor Collectives Launchers Cores Memory Disk Extra hf,Extra track,Extra gpu"
    for name in expected.replace(" Extra", ",Extra").replace(" ", ",").replace("Extra,", "Extra ").split(","):
        assert name in findings, name
    assert "Open files" in findings
    assert findings["PyTorch"].status == "ok"
    assert "Gloo" in findings["Collectives"].text
    assert all(finding.status == "ok" or finding.remedy for finding in findings.values())
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_reduce() -> None:
    assert doctor._all_reduce()[0].status == "ok"


def test_between_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    from trainwright.cli import main

    assert main(["doctor", "--net", "--nproc", "2", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capfd.readouterr().out)}
    assert found["Ranks"]["text"].startswith("2 on 1 host(s)")
    assert "1 measured" in found["Gloo pairs"]["text"]
    assert "all-to-all" in found["Gloo collectives"]["text"]
    assert found["Gloo clocks"]["status"] == found["Versions"]["status"] == "ok"


def test_pairs_of_many_ranks_stay_few() -> None:
    assert which_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    many = which_pairs(1000)
    assert len(many) <= 2000
    assert {rank for pair in many for rank in pair} == set(range(1000))


def test_a_slow_pair_and_a_wrong_clock_are_named() -> None:
    pairs = [Pair(0, 1, 1e-5, 1e9, 0.0), Pair(0, 2, 1e-5, 1e8, 3.0), Pair(1, 2, 1e-5, 1e9, 0.0)]
    told = {finding.name: finding for finding in _judge("Gloo", pairs, {"all-reduce": 1e9}, ["a", "b", "c"])}
    assert told["Gloo pairs"].status == told["Gloo clocks"].status == "warn"
    assert "0 (a) - 2 (c)" in told["Gloo pairs"].text
    assert told["Gloo pairs"].remedy
    assert told["Gloo clocks"].remedy


def test_a_launch_that_hangs_or_fails_is_a_failure_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **keys: Any) -> None:
        raise subprocess.TimeoutExpired(command, keys["timeout"])

    def fail(command: list[str], **keys: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "rank 0 failed first")

    for broken, said in ((hang, "did not finish"), (fail, "rank 0 failed first")):
        monkeypatch.setattr(subprocess, "run", broken)
        finding = doctor._all_reduce()[0]
        assert finding.status == "fail"
        assert said in finding.text
        assert finding.remedy


def test_a_check_that_breaks_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "_gpus", broken)
    findings = doctor.examine(tmp_path, self_test=False)
    assert any("no such device" in finding.text and finding.status == "warn" for finding in findings)
    assert any(finding.name == "Memory" for finding in findings)


def test_exit_code_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("Disk", "fail", "[bold]full[/bold]", "free some space")]
    monkeypatch.setattr(doctor, "examine", lambda *args, **keys: found)
    assert doctor.run_doctor(tmp_path, as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"name": "Disk", "status": "fail", "text": "[bold]full[/bold]", "remedy": "free some space"}
    ]
    assert doctor.run_doctor(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "[bold]full[/bold]" in shown
    assert "free some space" in shown
    assert "1 to repair" in shown


def test_too_many_threads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(8 * (os.cpu_count() or 1)))
    assert [finding.status for finding in doctor._cores()] == ["ok", "warn"]


def test_links_between_machines_are_judged_by_themselves() -> None:
    """Two machines of two ranks over a link a hundred times slower than memory: nothing is wrong with it."""
    hosts = ["a", "a", "b", "b"]
    pairs = [Pair(x, y, 1e-5, 1e9 if hosts[x] == hosts[y] else 1e7, 0.0) for x, y in which_pairs(4)]
    told = {finding.name: finding for finding in _judge("Gloo", pairs, {"all-reduce": 1e9}, hosts)}
    assert told["Gloo pairs of one machine"].status == told["Gloo pairs between machines"].status == "ok"
    assert "4 measured" in told["Gloo pairs between machines"].text
    slow = [*pairs[:-1], Pair(2, 3, 1e-5, 1e8, 0.0)]
    told = {finding.name: finding for finding in _judge("Gloo", slow, {"all-reduce": 1e9}, hosts)}
    assert told["Gloo pairs of one machine"].status == "warn"
    assert "2 (b) - 3 (b)" in told["Gloo pairs of one machine"].text
