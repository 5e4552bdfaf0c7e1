"""Errors in the shape of the OpenAI API, with the right status."""

from __future__ import annotations

from typing import Any

from tandem_client import (
    RequestError,
    RequestTimeoutError,
    ServerUnavailableError,
    TandemClientError,
)

_STATUS = {"INVALID_ARG": 400, "NOT_FOUND": 404, "UNSUPPORTED": 501, "UNAVAILABLE": 503}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
}


class APIError(Exception):
    """What is answered in place of a result."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @classmethod
    def of(cls, error: TandemClientError) -> APIError:
        """The error that stands for one of the client's."""
        if isinstance(error, RequestTimeoutError):
            return cls(504, str(error), "timeout")
        if isinstance(error, ServerUnavailableError):
            return cls(503, str(error), "server_unavailable")
        assert isinstance(error, RequestError)
        code = "no_chat_template" if "no chat template" in str(error) else error.code.lower()
        return cls(_STATUS.get(error.code, 500), str(error), code)

    def to_json(self) -> dict[str, Any]:
        """As the body of a response, or an event of a stream."""
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }
