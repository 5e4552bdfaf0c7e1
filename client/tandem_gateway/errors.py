"""Errors in the shape of the OpenAI API, with the right status."""

from __future__ import annotations

import reprlib
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tandem_client import (
    RequestError,
    RequestTimeoutError,
    ServerUnavailableError,
    TandemClientError,
)
from tandem_options import NAMES, OptionError

_STATUS = {"INVALID_ARG": 400, "NOT_FOUND": 404, "UNSUPPORTED": 501, "UNAVAILABLE": 503}
# Words of the server's -> the code that clients look for.
_CODES = {
    "no chat template": "no_chat_template",
    "maximum context length": "context_length_exceeded",
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
# What is sent back is never more than a short piece of what came.
_MAX_MESSAGE = 500
_MAX_PIECE = 80
_RETRY_SECONDS = 1


class APIError(Exception):
    """What is answered in place of a result.

    Args:
        retry_after: seconds after which another try makes sense; 1 by default with 429 and 503.
        closes: whether nothing more is read from this connection.
        accepts: encodings of a body that are known here.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        *,
        retry_after: int | None = None,
        closes: bool = False,
        accepts: str = "",
    ) -> None:
        super().__init__(shorten(message, _MAX_MESSAGE))
        self.status = status
        self.code = code
        self.param = None if param is None else shorten(param)
        self.headers: dict[str, str] = {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if retry_after is None and status in (429, 503):
            retry_after = _RETRY_SECONDS
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        if accepts:
            self.headers["Accept-Encoding"] = accepts
        if closes:
            self.headers["Connection"] = "close"

    @classmethod
    def of(cls, error: Exception) -> APIError:
        """The error that stands for one of the client's, or of the framework's."""
        if isinstance(error, TandemClientError):
            return _of_client(error)
        if isinstance(error, OptionError):
            return cls(400, str(error), "invalid_value", error.name)
        if isinstance(error, RequestValidationError):
            return _of_validation(error)
        if isinstance(error, HTTPException):
            return cls(error.status_code, str(error.detail))
        return cls(500, "internal error")

    def to_json(self) -> dict[str, Any]:
        """As the body of a response, or an event of a stream."""
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def to_response(self) -> JSONResponse:
        """As a response of its own."""
        return JSONResponse(self.to_json(), self.status, self.headers)


def shorten(text: str, length: int = _MAX_PIECE) -> str:
    """The text, or its beginning if it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def no_route(method: str, path: str, error: HTTPException) -> APIError:
    """What is answered where there is nothing at a path, or not for this method."""
    allowed = (error.headers or {}).get("Allow")
    if allowed is None:
        return APIError(404, f"there is nothing at {shorten(path)}: see /v1/models")
    message = f"{shorten(method)} is not allowed at {shorten(path)}: use {allowed}"
    answer = APIError(405, message, "method_not_allowed")
    answer.headers["Allow"] = allowed
    return answer


def _of_client(error: TandemClientError) -> APIError:
    # Python's extensions add the lines of source at which they failed.
    message = str(error).partition("\n\nAt:")[0]
    if isinstance(error, RequestTimeoutError):
        return APIError(504, message, "timeout")
    if isinstance(error, ServerUnavailableError):
        return APIError(503, message, "server_unavailable")
    assert isinstance(error, RequestError)
    codes = [code for words, code in _CODES.items() if words in message]
    name = message.partition(" ")[0]
    return APIError(
        _STATUS.get(error.code, 500),
        message,
        codes[0] if codes else error.code.lower(),
        name if name in NAMES else None,
    )


def _of_validation(error: RequestValidationError) -> APIError:
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {problem['ctx']['error']}", "invalid_json")
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    given = shorten(reprlib.repr(problem.get("input")))
    message = f"{shorten(place) or 'the body'}: {problem['msg']}, got {given}"
    return APIError(400, message, "invalid_value", place or None)
