"""Shared fixtures; makes `ranks` (tests/ranks.py) importable by every test and every spawned rank."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is measured of this machine, or made up by a test, is not the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="trainwright-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# A suite in the background (nohup, a shell's &) inherits ignored signals, which are among what is tested.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def _one_thread_and_clean_group() -> Iterator[None]:
    """One thread a process, and no process group left behind for the next test."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        from trainwright.torch_private import quiet_known_warnings

        quiet_known_warnings()
    yield
    distributed = sys.modules.get("trainwright.distributed")
    if distributed is not None:
        distributed.shutdown()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a local S3 server, for those who put something in between."""
    object_server = pytest.importorskip("object_server")
    with object_server.serve() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix of its own on the server, which this process and its children reach with no further setting."""
    import object_server

    object_server.forget_connections()
    for name, value in object_server.environment(s3_port).items():
        monkeypatch.setenv(name, value)
    name = re.sub(r"\W+", "-", request.node.name)
    return f"s3://{object_server.BUCKET}/{name}-{os.getpid()}"
