"""Speculative decoding with one KV cache for drafter and verifier."""

from tandem.config import EngineConfig
from tandem.drafter_config import DrafterConfig
from tandem.engine import Engine
from tandem.errors import (
    ConfigError,
    DeadlineExceededError,
    DrafterMismatchError,
    EngineStoppedError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    StepError,
    TandemError,
    UnsupportedModelError,
    VerifierOutputError,
)
from tandem.requests.logprobs import TokenLogprobs
from tandem.requests.outputs import Delta, RequestOutput
from tandem.requests.params import Guide, SamplingParams
from tandem.requests.sequence import FinishReason, Sequence

__all__ = [
    "ConfigError",
    "DeadlineExceededError",
    "Delta",
    "DrafterConfig",
    "DrafterMismatchError",
    "Engine",
    "EngineConfig",
    "EngineStoppedError",
    "FinishReason",
    "Guide",
    "InvalidRequestError",
    "QueueFullError",
    "RequestCancelledError",
    "RequestOutput",
    "SamplingParams",
    "Sequence",
    "StepError",
    "TandemError",
    "TokenLogprobs",
    "UnsupportedModelError",
    "VerifierOutputError",
]
