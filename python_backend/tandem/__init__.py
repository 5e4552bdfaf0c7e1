"""Speculative decoding with one KV cache for drafter and verifier."""

from tandem.config import DrafterConfig, EngineConfig, SamplingParams
from tandem.engine import Engine
from tandem.errors import (
    ConfigError,
    DrafterMismatchError,
    EngineStoppedError,
    InvalidRequestError,
    RequestCancelledError,
    TandemError,
    UnsupportedModelError,
    VerifierOutputError,
)
from tandem.outputs import Delta, RequestOutput
from tandem.sequence import FinishReason, Sequence

__all__ = [
    "ConfigError",
    "Delta",
    "DrafterConfig",
    "DrafterMismatchError",
    "Engine",
    "EngineConfig",
    "EngineStoppedError",
    "FinishReason",
    "InvalidRequestError",
    "RequestCancelledError",
    "RequestOutput",
    "SamplingParams",
    "Sequence",
    "TandemError",
    "UnsupportedModelError",
    "VerifierOutputError",
]
