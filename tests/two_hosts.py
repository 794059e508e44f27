"""Two machines on this one: network namespaces joined by a cable, each with its own host name and, where asked, its own
disk at a path that both have. Needs root and iproute2 (`available`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """A namespace: commands run in it with `command`."""

    name: str
    address: str
    interface: str
    disk: tuple[Path, Path] | None
    """(what lies at, this path) on this host alone."""

    def command(self, *arguments: str) -> list[str]:
        """`arguments`, run on this host."""
        setting = ["hostname", self.name]
        mount = f"mount --bind '{self.disk[0]}' '{self.disk[1]}' && " if self.disk is not None else ""
        shell = f'{" ".join(setting)} && {mount}exec "$@"'
        enter = ["ip", "netns", "exec", self.name, "unshare", "-u", "-m", "--propagation", "private"]
        return [*enter, "sh", "-c", shell, "sh", *arguments]

    def environment(self) -> dict[str, str]:
        """What torch needs to use the cable."""
        return {"GLOO_SOCKET_IFNAME": self.interface}


def _run(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def available() -> bool:
    """Whether this process may make namespaces."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    name = f"tw{os.getpid()}probe"
    made = _run("ip", "netns", "add", name)
    works = made and _run("ip", "netns", "exec", name, "unshare", "-u", "-m", "true")
    _run("ip", "netns", "delete", name)
    return works


@contextlib.contextmanager
def two_hosts(disk: Path | None = None, rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a link between them.

    disk: a folder that is another one on each of them. rate: of the link each way, as `tc` writes it; else as fast as it goes.
    """
    tag = f"tw{os.getpid()}"
    hosts = []
    for index, letter in enumerate("ab"):
        own = None
        if disk is not None:
            disk.mkdir(parents=True, exist_ok=True)
            place = disk.with_name(f"{disk.name}-of-{letter}")
            place.mkdir()
            own = (place, disk)
        hosts.append(Host(f"{tag}{letter}", f"10.213.7.{index + 1}", f"{tag}v{letter}", own))
    first, second = hosts
    try:
        for host in hosts:
            assert _run("ip", "netns", "add", host.name)
        assert _run("ip", "link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        for host in hosts:
            assert _run("ip", "link", "set", host.interface, "netns", host.name)
            inside = ("ip", "-n", host.name)
            assert _run(*inside, "address", "add", f"{host.address}/24", "dev", host.interface)
            assert _run(*inside, "link", "set", host.interface, "up")
            assert _run(*inside, "link", "set", "lo", "up")
            if rate is not None:
                shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
                assert _run("tc", "-n", host.name, "qdisc", "add", "dev", host.interface, *shape)
        yield first, second
    finally:
        for host in hosts:
            _run("ip", "netns", "delete", host.name)
