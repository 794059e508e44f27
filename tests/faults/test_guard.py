"""Every fault is caused for real on Gloo ranks under the launcher: what is said, how soon, and that nothing is left behind.

The cases numbered 5, 6, 7 and 15 are those where other engines hang mutely or name no culprit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAULTS = (
    "save_on_rank_0", "evaluate_on_rank_1", "fewer_batches", "module_twice", "other_branch", "other_config", "many_micro_batches",
    "busy_outside", "stopped_process", "killed", "raises", "segfault",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A job's end: exit code, what the console showed."""

    code: int
    text: str
    folder: Path


def _run(fault: str, folder: Path) -> Ended:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "faulty", fault, "2", str(folder)],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return Ended(done.returncode, done.stdout, folder)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All faults, two at a time."""
    parent = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(lambda fault: _run(fault, parent / fault), FAULTS), strict=True))


def test_slow_ranks_are_left_alone(tmp_path: Path) -> None:
    found = _run("slow_but_healthy", tmp_path / "slow")
    assert found.code == 0, found.text
    assert found.text == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_job_prints_a_screen_and_leaves_nothing_behind(ended: dict[str, Ended], fault: str) -> None:
    found = ended[fault]
    assert found.code == 1, found.text
    assert found.text.count("\n") <= 40, found.text
    assert f"logs: {found.folder}/logs" in found.text
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in running.splitlines() if str(found.folder) in line]


def test_case_6_a_call_on_one_rank_names_the_two_calls(ended: dict[str, Ended]) -> None:
    text = ended["save_on_rank_0"].text
    assert "the ranks are in different calls: rank 0 called save(), the others did not" in text
    assert re.search(r"rank 0: save\(\) after step 3, for \d", text)
    assert re.search(r"rank 1: step 4 in forward", text)
    assert "remedy: call save() on every rank" in text
    assert "rank 1 called evaluate(), the others did not" in ended["evaluate_on_rank_1"].text


def test_case_7_fewer_batches_on_one_rank(ended: dict[str, Ended]) -> None:
    text = ended["fewer_batches"].text
    assert "rank 1 ended after step 2: no batch for step 3, in which rank 0 waits" in text
    assert "rank 0: step 3 in forward" in text
    assert "tw.even(" in text


def test_case_5_a_module_more_on_one_rank(ended: dict[str, Ended]) -> None:
    text = ended["module_twice"].text
    assert "the ranks called different collectives: rank 0: all_gather(blocks.2); rank 1: all_gather(blocks.0)" in text
    assert re.search(r"rank 0: step 3 in \w+ of blocks", text)
    assert re.search(r"rank 1: step 3 in \w+ of blocks", text)


def test_ranks_that_exchange_the_wrong_tensors_without_any_error_are_stopped(ended: dict[str, Ended]) -> None:
    text = ended["other_branch"].text
    assert "different collectives in step 3: rank 0: reduce_scatter(blocks.1); rank 1: reduce_scatter(blocks.0)" in text


def test_another_config_is_refused_at_the_start(ended: dict[str, Ended]) -> None:
    assert "batch.accumulation is 2 on rank 0, 3 on rank 1" in ended["other_config"].text


def test_another_number_of_micro_batches_tells_both_places(ended: dict[str, Ended]) -> None:
    text = ended["many_micro_batches"].text
    assert "different collectives" in text
    assert "rank 0: step 1 in update" in text
    assert "rank 1: step 1 in forward" in text


def test_a_rank_that_stays_away_is_named_with_its_stack(ended: dict[str, Ended]) -> None:
    text = ended["busy_outside"].text
    assert "rank 1 did not arrive where the others wait" in text
    assert "in write_a_thesis: time.sleep(600)" in text
    assert "rank 0: step 4 in forward" in text


def test_a_process_that_answers_no_more_is_named_and_ended(ended: dict[str, Ended]) -> None:
    text = ended["stopped_process"].text
    assert "rank 1: outside the engine, after step 3 (does not answer)" in text


def test_case_15_a_killed_rank_is_named_with_its_step_and_phase(ended: dict[str, Ended]) -> None:
    text = ended["killed"].text
    assert re.search(r"rank 1 died by SIGKILL on \S+ at step 7 in forward of blocks.1; rank 0 ended after it", text)
    assert "rank 0: step 7 in" in text


def test_the_first_error_is_shown_with_its_own_frames(ended: dict[str, Ended]) -> None:
    text = ended["raises"].text
    assert text.startswith("rank 1 failed first (exit code 1) on ")
    assert "after step 3" in text.splitlines()[0]
    assert "RuntimeError: the embedding is on fire" in text
    assert "site-packages" not in text
    assert text.count("Traceback") == 1
    assert "died by SIGSEGV" in ended["segfault"].text
    assert "in segfault" in ended["segfault"].text
