"""Connections: how many there are, and how long one may keep us waiting."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tandem_gateway.errors import APIError
from tandem_gateway.limits import Limits
from tandem_gateway.metrics import Metrics
from tandem_gateway.security import HEADERS

# For a client that was refused to read why: were the connection closed at once, what the client
# still sends would be answered by a reset, which may overtake the answer.
_LINGER_SECONDS = 2.0
_MAX_LINGERING = 128
# A body may come in so many pieces, and one more for every so many bytes: each costs the parser the
# same, however small.
_MAX_SMALL_PIECES = 256
_PIECE_BYTES = 256


class Connections:
    """All connections of one gateway."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self._by_address: Counter[str] = Counter()
        self.num_lingering = 0

    def enter(self, address: str) -> None:
        """Counts a connection.

        Raises:
            APIError: 429 or 503, there are too many from the address or in all.
        """
        limits = self.limits
        if self._by_address[address] >= limits.max_connections_per_address:
            raise APIError(429, "too many connections from your address", "address_connections")
        if self._by_address.total() >= limits.max_connections:
            raise APIError(503, "too many connections", "connections")
        self._count(address, 1)

    def leave(self, address: str) -> None:
        """Counts one less."""
        self._count(address, -1)

    def _count(self, address: str, change: int) -> None:
        self._by_address[address] += change
        if not self._by_address[address]:
            del self._by_address[address]
        self.metrics.connections.set(self._by_address.total())


class Protocol(H11Protocol):
    """Uvicorn's, with limits.

    On h11 rather than httptools: it bounds the headers' size. What it leaves open is closed here:
    the time for headers, clients that take nothing of their answer, and bodies in tiny pieces.
    """

    def __init__(self, *args: Any, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(h11.SERVER)
        self._all = connections
        self._limits = connections.limits
        self._address: str | None = None  # once counted
        self._is_lingering = False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        try:
            self._all.enter(address)
        except APIError as error:
            self._refuse(error)
        else:
            self._address = address
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop_timer(name)
        if self._address is not None:
            self._all.leave(self._address)
        self._all.num_lingering -= self._is_lingering

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._is_lingering:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        else:
            self._stop_timer("headers")
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_timer("unread")

    def on_response_complete(self) -> None:
        """An answer has been written."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_timer("flush", self._limits.write_seconds, self.transport.abort)
        elif self.conn.their_state is h11.SEND_BODY:
            # Refused before its body was read, which is thrown away.
            self._start_timer("unread", _LINGER_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come for `idle_seconds`."""
        super().timeout_keep_alive_handler()
        self._start_timer("flush", _LINGER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What came isn't HTTP."""
        if self.cycle is not None:
            # Nobody writes another answer.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(APIError(400, "this is not valid HTTP", "bad_request"))
        else:  # in the body of a request that was answered
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client takes less than we have."""
        super().pause_writing()
        self._start_timer("write", self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._stop_timer("write")

    def _await_headers(self) -> None:
        if "headers" not in self._timers:
            self._start_timer("headers", self._limits.header_seconds, self._headers_late)

    def _headers_late(self) -> None:
        message = f"the headers were not there within {self._limits.header_seconds:g} s"
        self._refuse(APIError(408, message, "header_timeout"))

    def _refuse(self, error: APIError) -> None:
        self._all.metrics.refused(error.code or "")
        if self.transport.is_closing() or self._all.num_lingering >= _MAX_LINGERING:
            self.transport.abort()
            return
        self._is_lingering = True
        self._all.num_lingering += 1
        self.transport.write(_raw(error))
        self.transport.write_eof()
        self._start_timer("flush", _LINGER_SECONDS, self.transport.abort)

    def _start_timer(self, name: str, seconds: float, then: Any) -> None:
        self._stop_timer(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop_timer(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


class _Parser(h11.Connection):
    """Refuses bodies in tiny pieces."""

    _num_pieces = _num_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > _MAX_SMALL_PIECES + self._num_bytes // _PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too small pieces")
        return event


def _raw(error: APIError) -> bytes:
    """An answer where there is no request to answer."""
    body = json.dumps(error.to_json()).encode()
    headers = {
        **HEADERS,
        **error.headers,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
