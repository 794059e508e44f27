"""Groups over slow links: `trainwright lighthouse`, and what `trainwright train` does with `outer.groups`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from trainwright.errors import ConfigError, LaunchError

GROUP = "TRAINWRIGHT_GROUP"


def group_from_environment(overrides: list[str]) -> list[str]:
    """TRAINWRIGHT_GROUP as an override, unless the group is given there."""
    number = os.environ.get(GROUP)
    if number is None or any(o.startswith("outer.group=") for o in overrides):
        return []
    if not number.isdecimal():
        raise ConfigError(f"{GROUP}={number!r}", "a group's number, from 0", f"{GROUP}=0")
    return [f"outer.group={number}"]


def starts_all_groups(groups: int, group: int | None) -> bool:
    """Whether this process starts every group here. Raises LaunchError where a launcher has started one already."""
    from trainwright.launcher_variables import read_launch
    from trainwright.outer import check_installed

    if groups == 1:
        return False
    check_installed()
    if group is not None:
        return False
    launch = read_launch()
    if launch.launcher != "none":
        raise LaunchError(
            f"outer.groups={groups} under {launch.launcher}, without outer.group",
            "each group is a launch of its own, and knows its number",
            f"{GROUP}=0 (1, ...) for each launch, and outer.lighthouse=host:29510",
        )
    return True


def lighthouse(
    bind: Annotated[str, typer.Option("--bind", help="Address and port that the groups reach.")] = "0.0.0.0:29510",
    min_groups: Annotated[int, typer.Option("--min-groups", min=1, help="Fewest groups that go on.")] = 1,
    patience: Annotated[
        float, typer.Option("--patience", help="Seconds that an outer step waits for a group that lives and is late.")
    ] = 600.0,
    heartbeat_timeout: Annotated[
        float, typer.Option("--heartbeat-timeout", help="Seconds of silence after which a group is held for dead.")
    ] = 3.0,
) -> int:
    """Where groups of ranks meet (config: outer); one for a run, on a host that all groups reach."""
    from trainwright.outer import check_installed
    from trainwright.outer.lighthouse import serve

    check_installed()
    serve(bind, min_groups=min_groups, patience_s=patience, heartbeat_timeout_s=heartbeat_timeout)
    return 0
