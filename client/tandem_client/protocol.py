"""What goes over the wire: a prompt and options into tensors, responses into chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import InferResult, service_pb2

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


class Exchange:
    """One request and the reading of its responses, in whatever way they travel.

    Args:
        url: the server's address, for error messages.

    Raises:
        RequestError: the prompt has characters that UTF-8 can't hold.
    """

    def __init__(self, url: str, model: str, prompt: str, stream: bool, options: Options) -> None:
        self._url = url
        self._answered = self._ended = False
        self.request = make_request(model, prompt, stream=stream, options=options)

    def read(self, message: Any) -> Chunk | None:
        """One response's chunk; None for one that only marks the end.

        Raises:
            RequestError: the server refused or failed the request.
        """
        self._answered = True
        if message.error_message:
            raise RequestError(message.error_message)
        response = message.infer_response
        # Reading an absent key of the map would add it.
        if "triton_final_response" in response.parameters:
            self._ended = response.parameters["triton_final_response"].bool_param
        return read_chunk(InferResult(response)) if response.outputs else None

    def check_ended(self) -> None:
        """Raises ServerUnavailableError if the stream ended before its last response."""
        if not self._ended:
            raise ServerUnavailableError(f"{self._url} ended the answer before it was complete")

    def explain(self, error: grpc.RpcError) -> TandemClientError:
        """What a user can do something about, from an error of the connection."""
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RequestTimeoutError("the answer was not complete in time")
        if code is not grpc.StatusCode.UNAVAILABLE:
            return RequestError(f"{code.name}: {details}")
        if self._answered:
            return ServerUnavailableError(f"lost the connection to {self._url}: {details}")
        return ServerUnavailableError(
            f"no server answers at {self._url}: start one with `make serve`, or give the address "
            "of its gRPC service"
        )


def make_request(model: str, prompt: str, *, stream: bool, options: Options) -> Any:
    """The message for one request, each of its tensors of shape `[1, 1]`.

    Raises:
        RequestError: the prompt has characters that UTF-8 can't hold.
    """
    try:
        text = prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8: {error}") from error
    sampling = {name: value for name, value in options.items() if value is not None}
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in (("text_input", text), ("sampling_parameters", json.dumps(sampling))):
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1, 1])
        tensor.contents.bytes_contents.append(value if isinstance(value, bytes) else value.encode())
    tensor = request.inputs.add(name="stream", datatype="BOOL", shape=[1, 1])
    tensor.contents.bool_contents.append(stream)
    return request


def read_chunk(result: InferResult) -> Chunk:
    """The chunk that a response's tensors hold."""

    def text(name: str) -> str:
        value: bytes = result.as_numpy(name)[0]
        return value.decode()

    def count(name: str) -> int:
        return int(result.as_numpy(name)[0])

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
