"""Errors of the client.

TandemClientError
├── ServerUnavailableError   nobody answers at the address, or the model died
├── RequestError             the server refused or failed the request
└── RequestTimeoutError      the answer was not complete in time
"""


class TandemClientError(Exception):
    """Base of all errors of this package."""


class ServerUnavailableError(TandemClientError):
    """Nobody answers at the address, or the model that owed an answer has died."""


class RequestError(TandemClientError):
    """The server refused or failed the request; the message is the server's.

    Attributes:
        code: Triton's name for the kind of error: INVALID_ARG, NOT_FOUND, UNAVAILABLE, INTERNAL,
            CANCELLED or UNSUPPORTED.
    """

    def __init__(self, message: str, code: str = "INVALID_ARG") -> None:
        super().__init__(message)
        self.code = code


class RequestTimeoutError(TandemClientError):
    """The answer was not complete within the timeout; the request is cancelled."""
