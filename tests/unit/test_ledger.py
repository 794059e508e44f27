"""The ledger: what is noted is read, by other processes too, also after an error or a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.ledger import LAUNCHER, Ledger, collective_call
from trainwright.ledger_folder import read, read_folder, sweep
from trainwright.position import BYTES, RING
from trainwright.processes import ProcessId


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger()
    found.open(tmp_path / "launch" / "rank-3.ledger", 3, 8, "node-1")
    return found


def test_places_are_read_back(ledger: Ledger) -> None:
    assert ledger.path is not None
    with ledger.call("train_batch", 6):
        ledger.micro_batch(1, 4)
        with ledger.phase("forward"):
            ledger.module(b"blocks.3")
            ledger.collective(b"all_gather(blocks.3)")
            found = read(ledger.path)
            assert found == ledger.position()
            assert found is not None
            assert (found.rank, found.world_size, found.host) == (3, 8, "node-1")
            assert found.process == ProcessId.own()
            assert found.describe() == "step 7 in forward of blocks.3, micro-batch 2 of 4"
            assert found.last_collective == "all_gather(blocks.3)"
        ledger.step_done(7)
    assert ledger.position().describe() == "outside the engine, after step 7"
    with ledger.call("save", 7):
        assert ledger.position().describe() == "save() after step 7"
        with ledger.call("evaluate", 7):  # inside another call: the outer one is what ranks have to agree on
            assert ledger.position().call == "save"


def test_what_is_noted_aside_is_forgotten(ledger: Ledger) -> None:
    assert ledger.path is not None
    with ledger.call("train_batch", 6):
        ledger.collective(b"all_gather(blocks.3)")
        before = ledger.position()
        with ledger.aside(), ledger.phase("backward"):
            ledger.module(b"another")
            ledger.collective(b"reduce_scatter(another)")
            assert ledger.position().last_collective == "reduce_scatter(another)"
            assert read(ledger.path) == before, "others see the job's"
        assert ledger.position() == read(ledger.path) == before
        with ledger.phase("forward"):  # the file is written to again
            ledger.module(b"blocks.4")
            assert read(ledger.path) == ledger.position() != before


def test_what_an_error_ended_stays_to_be_read_until_the_next_call(ledger: Ledger) -> None:

    def fail() -> None:
        with ledger.call("train_batch", 1), ledger.phase("backward"):
            ledger.module(b"blocks.0")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert ledger.position().describe() == "step 2 in backward of blocks.0"
    with ledger.call("evaluate", 1):
        assert ledger.position().describe() == "evaluate() after step 1"


def test_the_ring_and_the_fingerprint(ledger: Ledger) -> None:
    for number in range(RING + 5):
        ledger.collective(b"c%d" % number)
    found = ledger.position()
    assert found.collectives == RING + 5
    assert found.last_collectives == tuple(f"c{n}" for n in range(5, RING + 5))
    other = Ledger()
    for number in range(RING + 5):
        other.collective(b"c%d" % number)
    assert ledger.take_fingerprint() == other.take_fingerprint() != 0
    assert ledger.take_fingerprint() == 0
    other.collective(b"x" * 300)  # longer than its room
    assert other.position().last_collective == "x" * 64


def test_long_names_do_not_reach_the_next_field(ledger: Ledger) -> None:
    with ledger.call("train_batch", 1), ledger.phase("forward"):
        ledger.module(b"a.very.long.name." * 20)
        ledger.collective(b"all_gather(x)")
        found = ledger.position()
    assert found.module == ("a.very.long.name." * 20)[:128]
    assert found.collectives == 1


def test_it_outlives_a_kill_and_is_swept_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / f"trainwright-ledger-{os.getuid()}-job"
    code = (
        "import os, signal; from pathlib import Path; from trainwright.ledger import here\n"
        f"here.open(Path({str(folder)!r}) / 'rank-0.ledger', 0, 2, 'h')\n"
        "with here.call('train_batch', 3), here.phase('forward'):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [p.describe() for p in read_folder(folder)] == ["step 4 in forward"]
    (folder / "agent").mkdir()  # the launcher's, killed too
    launcher = Ledger()
    launcher.open(folder / LAUNCHER, -1, 2, "")  # it lives, and has yet to read what its ranks died of
    sweep(tmp_path)
    assert [p.describe() for p in read_folder(folder)] == ["step 4 in forward"]
    launcher.close()
    begins = tmp_path / f"{folder.name}-begins"
    begins.mkdir()
    sweep(tmp_path)
    assert not folder.exists()
    assert begins.is_dir()


def test_files_that_are_no_ledgers_are_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "absent") is None
    (tmp_path / "rank-0.ledger").write_bytes(b"short")
    (tmp_path / "rank-1.ledger").write_bytes(os.urandom(BYTES))
    assert read_folder(tmp_path) == []


def test_strangers_and_reused_numbers_are_not_taken_for_ranks(tmp_path: Path) -> None:
    own = ProcessId.own()
    assert own.runs
    assert own.in_sight
    assert not ProcessId(own.pid, own.namespace, own.start + 1).runs  # the number was given anew
    other = ProcessId(own.pid, own.namespace + 1, own.start)
    assert not other.in_sight
    assert other.runs  # nothing is known of it
    other.kill(9)
    ProcessId(own.pid, own.namespace, own.start - 1).kill(9)
    (tmp_path / "rank-0.ledger").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "rank-1.ledger")
    assert read_folder(tmp_path) == []
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="another user's"):
        Ledger().open(tmp_path / "open" / "rank-0.ledger", 0, 2, "h")


def test_a_ledger_in_order_leaves_no_file(ledger: Ledger) -> None:
    assert ledger.path is not None
    folder = ledger.path.parent
    ledger.close()
    assert not folder.exists()
    ledger.module(b"blocks.1")
    assert ledger.position().module == "blocks.1"


def test_an_error_of_a_call_is_explained() -> None:
    class Thing:
        global_step = 2

        @collective_call("save")
        def save(self) -> None:
            raise OSError("disk")

    import trainwright.ledger as module

    seen: list[BaseException] = []
    module.here.explain = seen.append
    try:
        with pytest.raises(OSError, match="disk"):
            Thing().save()
    finally:
        module.here.explain = None
    assert len(seen) == 1
