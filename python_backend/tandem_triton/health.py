"""Whether the model lives and takes requests, asked over HTTP of the model's own process.

Triton answers that it is live and ready when the process that holds the model is long dead, and
never starts another. What a cluster asks it therefore asks here: no answer says enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

# What is wrong; empty if nothing is.
Check = Callable[[], str]
_LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1")


class HealthServer:
    """Answers `/live` and `/ready` with 200, or 503 and the reason; `/drain` when it is done.

    Anyone may ask; only this machine, or pod, may drain.

    Args:
        port: listens there on all addresses; 0 picks a free one.
        live: why the process should be restarted.
        ready: why new requests should go elsewhere.
        drain: turns readiness off and returns when nothing runs any more.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int, live: Check, ready: Check, drain: Callable[[], None]) -> None:
        self._parent = os.getppid()
        checks = {"/live": partial(self._ask, live), "/ready": partial(self._ask, ready)}
        handler = type("Handler", (_Handler,), {"checks": checks, "drain": staticmethod(drain)})
        self._server = _Server(("", port), handler)
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, name="tandem-health", daemon=True)
        self._thread.start()

    def _ask(self, check: Check) -> str:
        # Triton can die before this process, and take no more requests.
        return "the server is gone" if os.getppid() != self._parent else check()

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a drain that is being waited for


class _Handler(BaseHTTPRequestHandler):
    checks: dict[str, Check]
    drain: Callable[[], None]
    timeout = 5.0

    def do_GET(self) -> None:
        """One question."""
        if self.path in self.checks:
            reason = self.checks[self.path]()
            self._answer(503 if reason else 200, reason or "ok")
        elif self.path == "/drain" and self.client_address[0] in _LOOPBACK:
            self.drain()
            self._answer(200, "drained")
        elif self.path == "/drain":
            self._answer(403, "only from within the pod")
        else:
            self._answer(404, "/live, /ready or /drain")

    def _answer(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second: nothing is logged."""
