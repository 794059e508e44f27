"""What ranks find out about their machines before they train: one error on all of them, naming who differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranks import run_ranks
from trainwright import distributed
from trainwright.errors import ConfigError, DataError, DataVersionError, LaunchError, TrainwrightError
from trainwright.guard import same_machines
from trainwright.guard.same_machines import check_same_data, check_same_software, clock_problem
from trainwright.guard.shared_folder import Sites, describe, sites_of
from trainwright.guard.together import together


def refused(action: object, kind: type[TrainwrightError]) -> TrainwrightError:
    with pytest.raises(kind) as error:
        action()  # type: ignore[operator]
    return error.value


def machines_main(rank: int, folder: str) -> None:
    assert check_same_software() is None
    check_same_data("abc")
    if rank == 1:
        distributed.host = lambda: "other"
        same_machines.metadata.version = lambda name: "9.9"  # type: ignore[assignment]
    here = distributed.host() if rank == 0 else "?"
    error = refused(check_same_software, LaunchError)
    assert "9.9 on other (rank 1)" in error.got
    assert error.got.startswith("Trainwright is ")
    assert rank == 1 or here in error.got
    error = refused(lambda: check_same_data("abc" if rank == 0 else "def"), DataVersionError)
    assert "def on other (rank 1)" in error.got

    def fails_on_one() -> int:
        if rank == 1:
            raise DataError("no data here", "a rule", "a remedy")
        return 5

    error = refused(lambda: together(fails_on_one, "a test"), DataError)
    assert (error.got, error.rule, error.remedy) == ("rank 1 on other: no data here", "a rule", "a remedy")

    def fails_on_all() -> None:
        raise ConfigError("the same everywhere")

    assert refused(lambda: together(fails_on_all, "a test"), ConfigError).got == "the same everywhere"
    assert together(lambda: rank, "a test") == rank
    if rank == 1:
        Path(folder, "file").touch()
    error = refused(lambda: sites_of(Path(folder, "good" if rank == 0 else "file")), ConfigError)
    assert error.got.count("other: ") == 1


def test_ranks_of_two_machines_agree_on_what_is_wrong(tmp_path: Path) -> None:
    run_ranks(machines_main, 2, str(tmp_path))


def test_clocks() -> None:
    assert clock_problem([("a", 100.0), ("b", 104.9)]) is None
    told = clock_problem([("a", 100.0), ("b", 99.0), ("c", 131.0)])
    assert told is not None
    assert "the clock of c is 32 s ahead of b's" in told


def test_sites() -> None:
    sites = Sites((0, 0, 2, 2, 2))
    assert not sites.shared
    assert sites.members(3) == [2, 3, 4]
    assert describe(sites, ["a", "a", "b", "b", "c"]) == "ranks 0-1 (a) and another of ranks 2-4 (b/c)"
    assert Sites.alone(3).shared
