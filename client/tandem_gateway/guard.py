"""What is decided from a request's headers, before its body is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem_gateway.auth import Keys
from tandem_gateway.errors import APIError
from tandem_gateway.metrics import Metrics
from tandem_gateway.rates import Rates

# In the scope of a guarded request: the name of its key, empty where none is asked for,
KEY = "tandem.key"
# and whom its rates are counted for: the key, or the address where there are no keys.
OWNER = "tandem.owner"
# What begins so needs a key and counts as a request.
_API = ("/v1", "/tokenize", "/detokenize")


def is_api(scope: Scope) -> bool:
    """Whether a request is for the API; others have no body that is read."""
    path: str = scope["path"]
    return path.startswith(_API)


class Guard:
    """Lets requests in that have a key, plain framing, and a rate that isn't used up."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, rates: Rates, max_body_bytes: int, metrics: Metrics
    ) -> None:
        self._app = app
        self._keys = keys
        self._rates = rates
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = self._counted(scope, send) if is_api(scope) else send
        try:
            headers = dict(scope["headers"])
            _check_framing(headers)
            if is_api(scope) or scope["path"] == "/metrics":
                self._identify(scope, headers.get(b"authorization", b""))
            self._check_length(int(headers.get(b"content-length", 0)))
            if is_api(scope):
                self._rates.admit(scope[OWNER])
        except APIError as error:
            self._metrics.refused(error.code or str(error.status))
            await error.to_response()(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _identify(self, scope: Scope, authorization: bytes) -> None:
        key = self._keys.find(authorization) if self._keys else ""
        if key is None:
            raise APIError(
                401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        address = scope["client"][0] if scope.get("client") else ""
        scope[KEY], scope[OWNER] = key, key or address

    def _check_length(self, length: int) -> None:
        if length > self._max_body_bytes:
            raise too_large(self._max_body_bytes)

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope.get(KEY, "none"), message["status"])
            await send(message)

        return send_counted


def _check_framing(headers: dict[bytes, bytes]) -> None:
    if b"content-length" in headers and b"transfer-encoding" in headers:
        # A proxy in between may have read the other one: what follows can't be trusted.
        raise APIError(
            400, "give Content-Length or Transfer-Encoding, not both", "bad_framing", closes=True
        )


def too_large(max_bytes: int) -> APIError:
    """A body over the limit."""
    return APIError(413, f"the body is larger than {max_bytes} bytes", "too_large")
