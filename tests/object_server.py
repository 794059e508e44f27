"""A local S3 server over real HTTP (moto, a process of its own), and a proxy that cuts connections halfway."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

from trainwright.launcher_variables import free_port

BUCKET = "trainwright-tests"


def environment(port: int) -> dict[str, str]:
    """What a process needs to reach the server (or the proxy before it) at `port`."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def forget_connections() -> None:
    """fsspec keeps a file system with the address it was made for: the next one is made anew."""
    import fsspec
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.config.conf.clear()


@contextlib.contextmanager
def serve() -> Iterator[int]:
    """Runs the server; its port. The bucket is there."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the S3 server ended"
            request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=5).close()
                break
            assert time.monotonic() < deadline_s, "the S3 server does not answer"
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


class CuttingProxy:
    """Forwards connections to `target`; the next `cuts_left` of them whose client sends more than `after_bytes` are closed
    there. A multi-megabyte upload is thus cut in its middle, as a lost link cuts it. `cuts` counts them."""

    def __init__(self, target: int, after_bytes: int) -> None:
        self._target, self._after_bytes = target, after_bytes
        self.cuts = self.cuts_left = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def environment(self) -> dict[str, str]:
        return {**os.environ, **environment(self.port)}

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as server:
            while True:
                ready, _, _ = select.select([client, server], [], [], 60)
                for source, sink in ((client, server), (server, client)):
                    if source not in ready:
                        continue
                    data = source.recv(65536)
                    if not data:
                        return
                    sent += len(data) if source is client else 0
                    if self.cuts_left and sent > self._after_bytes:
                        self.cuts_left -= 1
                        self.cuts += 1
                        return
                    sink.sendall(data)
