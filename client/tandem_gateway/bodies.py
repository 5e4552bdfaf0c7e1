"""Requests' bodies: read within a time, and together within some memory."""

from __future__ import annotations

import asyncio
import zlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem_gateway.errors import APIError, shorten
from tandem_gateway.guard import is_api, too_large
from tandem_gateway.limits import Limits
from tandem_gateway.metrics import Metrics

# Bodies up to here are always taken: there are no more of them than connections.
SMALL_BYTES = 2**16
# zlib's number for a gzip file with a window of any size.
_GZIP = 16 + zlib.MAX_WBITS


class Bodies:
    """Hands requests on once their bodies are there.

    A body counts against `max_bodies_bytes` until its request has been answered, since in other
    forms it lies in memory for as long.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not is_api(scope):
            await self._app(scope, receive, send)
            return
        held = _Held(self)
        try:
            is_packed = _is_gzip(scope)
            body = await self._read(receive, held)
            if body is not None:
                if is_packed:
                    body = await self._unpack(body, held)
                await self._app(scope, _replay(body, receive), send)
        except APIError as error:
            self._metrics.refused(error.code or str(error.status))
            await error.to_response()(scope, receive, send)
        finally:
            held.resize(0)

    async def _read(self, receive: Receive, held: _Held) -> bytes | None:
        """The body; None if the client goes away."""
        pieces: list[bytes] = []
        num_bytes, more = 0, True
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    num_bytes += len(pieces[-1])
                    if num_bytes > self._limits.max_body_bytes:
                        raise too_large(self._limits.max_body_bytes)
                    more = message.get("more_body", False)
                    held.resize(num_bytes)
        except TimeoutError:
            late = f"the body was not there within {self._limits.body_seconds:g} s"
            raise APIError(408, late, "body_timeout") from None
        return b"".join(pieces)

    async def _unpack(self, packed: bytes, held: _Held) -> bytes:
        """The body in a gzip file, of which no more than the limit is ever made."""
        pieces: list[bytes] = []
        num_bytes, most = 0, self._limits.max_body_bytes
        unpacker = zlib.decompressobj(_GZIP)
        try:
            while not unpacker.eof:
                pieces.append(unpacker.decompress(packed, SMALL_BYTES))
                packed = unpacker.unconsumed_tail
                num_bytes += len(pieces[-1])
                if num_bytes > most:
                    raise too_large(most)
                if not pieces[-1] and not unpacker.eof:
                    raise APIError(400, "the body's gzip ends too early", "invalid_gzip")
                held.resize(num_bytes)
                # Whoever else waits for the event loop comes between.
                await asyncio.sleep(0)
            if unpacker.unused_data:
                raise APIError(400, "something follows the body's gzip", "invalid_gzip")
        except zlib.error as error:
            raise APIError(400, f"the body is not gzip: {error}", "invalid_gzip") from None
        return b"".join(pieces)

    def grow(self, num_bytes: int) -> None:
        """Counts bytes that came, or went if negative.

        Raises:
            APIError: 503, there are too many.
        """
        if num_bytes > 0 and self._num_bytes + num_bytes > self._limits.max_bodies_bytes:
            raise APIError(503, "too many large requests are under way", "bodies_full")
        self._num_bytes += num_bytes
        self._metrics.body_bytes.set(self._num_bytes)


class _Held:
    """What one body adds to all of them."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._num_bytes = 0

    def resize(self, num_bytes: int) -> None:
        counted = num_bytes if num_bytes > SMALL_BYTES else 0
        self._bodies.grow(counted - self._num_bytes)
        self._num_bytes = counted


def _is_gzip(scope: Scope) -> bool:
    """Whether the body is packed.

    Raises:
        APIError: 415, in another way than ours.
    """
    names = [value for name, value in scope["headers"] if name == b"content-encoding"]
    encoding = b",".join(names).strip().lower().decode("latin-1")
    if encoding in ("", "identity"):
        return False
    if encoding not in ("gzip", "x-gzip"):
        message = f"Content-Encoding {shorten(encoding)!r} is not known here: send gzip, or none"
        raise APIError(415, message, "unsupported_encoding", accepts="gzip")
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and then tells when the client goes away."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay
