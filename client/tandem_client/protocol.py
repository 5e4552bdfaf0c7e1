"""What goes over the wire: a prompt and options into tensors, responses into chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException

from tandem_client.errors import (
    RequestError,
    RequestTimeoutError,
    ServerUnavailableError,
    TandemClientError,
)


class Options(TypedDict, total=False):
    """How to generate; the server's defaults hold for what isn't given.

    Keys:
        max_tokens: tokens to generate at most.
        temperature, top_k, top_p, min_p, seed: how tokens are chosen.
        ignore_eos: go on after an end-of-sequence token.
        drafter: which of the server's drafters guesses ahead; "none" for plain decoding.
        num_speculative_tokens: draft tokens a step at most.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    ignore_eos: bool
    drafter: str
    num_speculative_tokens: int


@dataclass(frozen=True)
class Chunk:
    """What one step of the server added. The counts are this chunk's own.

    The first `accepted_text_length` characters of `text` are from drafts that were accepted.
    """

    text: str
    accepted_text_length: int = 0
    finish_reason: str | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def accepted_text(self) -> str:
        """The part that a drafter guessed."""
        return self.text[: self.accepted_text_length]

    @property
    def verifier_text(self) -> str:
        """The part that the verifier added."""
        return self.text[self.accepted_text_length :]


@dataclass(frozen=True)
class Completion:
    """A whole answer, and what it took."""

    text: str
    finish_reason: str | None
    num_input_tokens: int
    num_output_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    elapsed: float

    @classmethod
    def of(cls, chunks: Iterable[Chunk], elapsed: float) -> Completion:
        """Joins all chunks of an answer that took `elapsed` seconds."""
        chunks = list(chunks)
        return cls(
            text="".join(chunk.text for chunk in chunks),
            finish_reason=chunks[-1].finish_reason if chunks else None,
            num_input_tokens=chunks[-1].num_input_tokens if chunks else 0,
            num_output_tokens=sum(chunk.num_output_tokens for chunk in chunks),
            num_drafts=sum(chunk.num_drafts for chunk in chunks),
            num_draft_tokens=sum(chunk.num_draft_tokens for chunk in chunks),
            num_accepted_tokens=sum(chunk.num_accepted_tokens for chunk in chunks),
            elapsed=elapsed,
        )

    @property
    def tokens_per_second(self) -> float:
        """Output tokens by the time from request to end."""
        return self.num_output_tokens / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the draft tokens that were accepted; None if nothing was drafted."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens of a round that had drafts, the verifier's own included; 1 without any round."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)


def request_inputs(prompt: str, *, stream: bool, options: Options) -> list[InferInput]:
    """The input tensors of one request, each of shape `[1, 1]`."""
    sampling = {name: value for name, value in options.items() if value is not None}
    return [
        _tensor("text_input", "BYTES", prompt.encode()),
        _tensor("stream", "BOOL", stream),
        _tensor("sampling_parameters", "BYTES", json.dumps(sampling).encode()),
    ]


def _tensor(name: str, kind: str, value: bytes | bool) -> InferInput:
    tensor = InferInput(name, [1, 1], kind)
    tensor.set_data_from_numpy(np.array([[value]], dtype=bool if kind == "BOOL" else np.object_))
    return tensor


class Responses:
    """Reads one request's responses, in whatever way they arrive."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.ended = False

    def read(self, result: Any, error: InferenceServerException | None) -> Chunk | None:
        """One response's chunk; None for one that only marks the end.

        Raises:
            TandemClientError: the server is away, or the request failed.
        """
        if error is not None:
            self.ended = True
            raise client_error(error, self._url)
        final = result.get_response().parameters.get("triton_final_response")
        self.ended = final is not None and final.bool_param
        if result.as_numpy("text_output") is None:
            return None

        def text(name: str) -> str:
            value: bytes = result.as_numpy(name)[0][0]
            return value.decode()

        def count(name: str) -> int:
            return int(result.as_numpy(name)[0][0])

        return Chunk(
            text=text("text_output"),
            accepted_text_length=count("accepted_text_length"),
            finish_reason=text("finish_reason") or None,
            num_input_tokens=count("num_input_tokens"),
            num_output_tokens=count("num_output_tokens"),
            num_drafts=count("num_drafts"),
            num_draft_tokens=count("num_draft_tokens"),
            num_accepted_tokens=count("num_accepted_tokens"),
        )


def client_error(error: InferenceServerException, url: str) -> TandemClientError:
    """What a user can do something about, from what tritonclient reports."""
    status = str(error.status() or "")
    if "DEADLINE_EXCEEDED" in status:
        return RequestTimeoutError("the answer was not complete in time")
    if "UNAVAILABLE" in status:
        return ServerUnavailableError(
            f"no server answers at {url}: start one with `make serve`, or give its address"
        )
    return RequestError(str(error.message()))
