"""Whether the model lives and takes requests, asked over HTTP of the model's own process.

Triton answers that it is live and ready when the process that holds the model is long dead, and
never starts another. What a cluster asks it therefore asks here: no answer says enough.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

# What is wrong; empty if nothing is.
Check = Callable[[], str]
# Browsers let no script set a header of such a name, not even on a page that a trick with DNS has
# made this server's own.
DRAIN_HEADER = "Sec-Tandem-Drain"
_LOOPBACK = ("127.0.0.1", "::1")
_MAX_PORT = 2**16 - 1


class HealthServer:
    """Answers `/live` and `/ready` with 200, or 503 and the reason; `/drain` when it is done.

    Anyone may ask; only this machine, or pod, may drain: by POST, with `DRAIN_HEADER`.

    Args:
        host: the address to listen on; all, of IPv4 and IPv6, when empty.
        port: 0 picks a free one.
        live: why the process should be restarted.
        ready: why new requests should go elsewhere.
        drain: turns readiness off and returns when nothing runs any more.

    Raises:
        OSError: there is no such address or port, or the port is taken.
    """

    def __init__(
        self, host: str, port: int, live: Check, ready: Check, drain: Callable[[], None]
    ) -> None:
        self._parent = os.getppid()
        checks = {"/live": partial(self._ask, live), "/ready": partial(self._ask, ready)}
        handler = type("Handler", (_Handler,), {"checks": checks, "drain": staticmethod(drain)})
        self._server = _Server(host, port, handler)
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

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        if port > _MAX_PORT:
            raise OSError(None, f"ports end at {_MAX_PORT}")
        host = host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, *_, (address, *_) = found[0]
        super().__init__((str(address), port), handler)

    def server_bind(self) -> None:
        """For `::`, IPv4 comes along."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    checks: dict[str, Check]
    drain: Callable[[], None]
    timeout = 5.0

    def do_GET(self) -> None:
        """One question."""
        if self.path in self.checks:
            reason = self.checks[self.path]()
            self._answer(503 if reason else 200, reason or "ok")
        elif self.path == "/drain":
            self._answer(405, "draining takes POST", Allow="POST")
        else:
            self._answer(404, "/live, /ready or /drain")

    def do_POST(self) -> None:
        """The one order."""
        if self.path != "/drain":
            self._answer(405, "POST is for /drain", Allow="GET")
        elif not self._is_local():
            self._answer(403, "only from within the pod")
        elif DRAIN_HEADER not in self.headers:
            self._answer(403, f"draining needs the header {DRAIN_HEADER}")
        else:
            self.drain()
            self._answer(200, "drained")

    def _is_local(self) -> bool:
        own, peer = (
            str(address[0]).removeprefix("::ffff:")
            for address in (self.connection.getsockname(), self.client_address)
        )
        return peer in (*_LOOPBACK, own)

    def _answer(self, status: int, text: str, **headers: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second: nothing is logged."""
