"""Errors that Tandem raises, each with the Triton code that a client sees.

TandemError                    INTERNAL
├── ConfigError                INVALID_ARG   model.json or EngineConfig can't be used as given
├── UnsupportedModelError      UNSUPPORTED   the verifier's architecture doesn't fit the paged cache
├── DrafterMismatchError       INVALID_ARG   drafter and verifier don't belong together
├── InvalidRequestError        INVALID_ARG   a request's prompt or parameter is out of range
├── RequestCancelledError      CANCELLED     the client went away or asked to stop
├── DeadlineExceededError      UNAVAILABLE   the request's timeout passed
├── VerifierOutputError        INTERNAL      the verifier's logits for one request are not numbers
├── StepError                  INTERNAL      a step failed; the requests that it ran are lost
└── EngineStoppedError         UNAVAILABLE   the engine is shutting down or has failed
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from tandem_options.errors import OptionError
from tandem_options.errors import shorten as shorten


class TandemError(Exception):
    """Base of all errors of this package; `code` is a name of Triton's error codes."""

    code: ClassVar[str] = "INTERNAL"


class ConfigError(TandemError, ValueError):
    """The configuration names something that doesn't exist or a value that can't be used."""

    code = "INVALID_ARG"


class UnsupportedModelError(TandemError):
    """The verifier's architecture can't run on the paged cache; the message says why."""

    code = "UNSUPPORTED"


class DrafterMismatchError(TandemError):
    """The drafter doesn't fit its verifier; the message names both values."""

    code = "INVALID_ARG"


class InvalidRequestError(TandemError, ValueError):
    """A prompt or parameter of one request is out of range; the message names it."""

    code = "INVALID_ARG"


class QueueFullError(TandemError):
    """As many requests wait as may wait."""

    code = "UNAVAILABLE"


class RequestCancelledError(TandemError):
    """The request was cancelled before it was done."""

    code = "CANCELLED"


class DeadlineExceededError(TandemError):
    """The request's timeout passed before it was done."""

    code = "UNAVAILABLE"


class VerifierOutputError(TandemError):
    """The verifier produced logits that are not numbers for one request."""

    code = "INTERNAL"


class StepError(TandemError):
    """A step failed, for example because memory ran out; others can still run."""

    code = "INTERNAL"


class EngineStoppedError(TandemError):
    """The engine takes no more work: it is shutting down, or a step failed."""

    code = "UNAVAILABLE"


@contextmanager
def refusing() -> Iterator[None]:
    """Turns what is wrong with an option into an error of the engine's."""
    try:
        yield
    except OptionError as error:
        raise InvalidRequestError(str(error)) from error
