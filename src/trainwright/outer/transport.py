"""How a group that comes back gets the others' weights: safetensors over HTTP, in the background of both.

torchft decides who catches up from whom and carries the address (its `CheckpointTransport`); its own transports unpickle
what comes over the network and make the others wait until it is there. This one sends tensors alone, and receiving
begins a download and returns at once: the group listens to outer steps in the meantime and makes them up (catch_up.py).
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from torchft.checkpointing.transport import CheckpointTransport

from trainwright.errors import CheckpointError

Tensors = Mapping[str, Tensor]
_PIECE_BYTES = 1 << 20


class Download:
    """A snapshot on its way here."""

    def __init__(self, address: str, step: int, timeout_s: float) -> None:
        self._tensors: dict[str, Tensor] | None = None
        self._error: str | None = None
        self._thread = threading.Thread(
            target=self._run, args=(address, step, timeout_s), name="trainwright-catch-up", daemon=True
        )
        self._thread.start()

    def _run(self, address: str, step: int, timeout_s: float) -> None:
        host, _, port = address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
        try:
            connection.request("GET", f"/snapshot/{step}")
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"{address} answered {answer.status} {answer.reason}")
            self._tensors = load(answer.read())
        except Exception as error:  # whatever went wrong, another group may be asked
            self._error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    @property
    def done(self) -> bool:
        """Whether `result` is there."""
        return self._tensors is not None

    @property
    def failed(self) -> str | None:
        """Why it will never be there."""
        return self._error

    def result(self) -> dict[str, Tensor]:
        """The tensors. Raises CheckpointError where there are none."""
        self._thread.join()
        if self._tensors is None:
            raise CheckpointError(f"no weights from another group: {self._error}", "a group catches up from another")
        return self._tensors


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that goes away in the middle is no event here."""


class SnapshotTransport(CheckpointTransport[Any]):
    """torchft's transport of state between groups. `received` is called with each download that begins."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._taken = threading.Condition()
        self._step, self._body = -1, b""
        self._server = _Server((address, 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="trainwright-snapshots", daemon=True)
        self._thread.start()

    def metadata(self) -> str:
        """host:port, which torchft hands to the group that catches up."""
        return f"{self._address}:{self._server.server_address[1]}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Takes the snapshot that others will fetch; `state_dict` holds it under user/outer."""
        body = save({name: tensor.contiguous() for name, tensor in state_dict["user"]["outer"].items()})
        with self._taken:
            self._step, self._body = step, body
            self._taken.notify_all()

    def _snapshot(self, step: int) -> bytes | None:
        """That of outer step `step`; waits for it, since the other group may ask before it is taken here."""
        with self._taken:
            self._taken.wait_for(lambda: self._step >= step, self._timeout_s)
            return self._body if self._step == step else None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Begins to fetch and returns at once: under user/outer a `Download`."""
        download = Download(metadata, step, self._timeout_s)
        return {"user": {"outer": download}, "torchft": {"step": step, "batches_committed": 0}}

    def disallow_checkpoint(self) -> None:
        """torchft asks for it when weights are about to change: the snapshot is a copy, it may be fetched all the same."""

    def shutdown(self, wait: bool = True) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> Callable[..., BaseHTTPRequestHandler]:
        transport = self

        class Handler(BaseHTTPRequestHandler):
            timeout = transport._timeout_s

            def do_GET(self) -> None:
                step = self.path.removeprefix("/snapshot/")
                body = transport._snapshot(int(step)) if step.isdecimal() else None
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for at in range(0, len(body), _PIECE_BYTES):
                    self.wfile.write(body[at : at + _PIECE_BYTES])

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the console."""

        return Handler
