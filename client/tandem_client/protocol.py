"""What goes over the wire: a prompt and options into tensors, responses into chunks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import InferResult, service_pb2

from tandem_client.errors import (
    RequestError,
    RequestTimeoutError,
    ServerUnavailableError,
    TandemClientError,
)
from tandem_client.options import ENVELOPE, Options, Prompt, make_metadata
from tandem_client.tls import TLS, diagnose


@dataclass(frozen=True)
class Chunk:
    """What one step of the server added to one sequence. The counts are this chunk's own.

    The first `accepted_text_length` characters of `text` are from drafts that were accepted.
    `logprobs` and `token_ids` are there on request, `prompt_logprobs` with a sequence's first
    chunk; `stop_reason`, `seed`, `num_cached_tokens` (of the input), `acceptance_histogram` (the
    sequence's rounds by how many drafts were accepted) and the seconds come with its last.
    """

    text: str
    index: int = 0
    accepted_text_length: int = 0
    finish_reason: str | None = None
    stop_reason: str | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    is_accepted_draft: tuple[bool, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    prompt_logprobs: tuple[dict[str, Any], ...] = ()
    seed: int | None = None
    num_cached_tokens: int | None = None
    acceptance_histogram: tuple[int, ...] | None = None
    time_to_first_token: float | None = None
    total_time: float | None = None

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
    stop_reason: str | None
    seed: int | None
    num_input_tokens: int
    num_output_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    elapsed: float
    time_to_first_token: float | None = None

    @classmethod
    def of(cls, chunks: Iterable[Chunk], elapsed: float) -> Completion:
        """Joins the first sequence's chunks of an answer that took `elapsed` seconds."""
        chunks = [chunk for chunk in chunks if chunk.index == 0]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            finish_reason=chunks[-1].finish_reason if chunks else None,
            stop_reason=chunks[-1].stop_reason if chunks else None,
            seed=chunks[-1].seed if chunks else None,
            num_input_tokens=chunks[-1].num_input_tokens if chunks else 0,
            num_output_tokens=sum(chunk.num_output_tokens for chunk in chunks),
            num_drafts=sum(chunk.num_drafts for chunk in chunks),
            num_draft_tokens=sum(chunk.num_draft_tokens for chunk in chunks),
            num_accepted_tokens=sum(chunk.num_accepted_tokens for chunk in chunks),
            elapsed=elapsed,
            time_to_first_token=chunks[-1].time_to_first_token if chunks else None,
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


_T = TypeVar("_T")


class Exchange(Generic[_T]):
    """One request and the reading of its responses, in whatever way they travel.

    Args:
        url: the server's address, for error messages.
        request: what is sent, with these headers.
        read: what a response with outputs says.
    """

    def __init__(
        self,
        url: str,
        request: Any,
        read: Callable[[InferResult], list[_T]],
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._url = url
        self._answered = self._ended = False
        self._refusal: RequestError | None = None
        self._read = read
        self.metadata = metadata
        self.request = request

    def read(self, message: Any) -> list[_T]:
        """What one response says; nothing for an error or one that only marks the end.

        After an error, read on: Triton loses track of a request whose stream is cancelled in the
        instant of its last response, and then its shutdown takes until the exit timeout.
        """
        self._answered = True
        if message.error_message:
            self._refusal = refusal(message.error_message)
            return []
        response = message.infer_response
        # Reading an absent key of the map would add it.
        if "triton_final_response" in response.parameters:
            self._ended = response.parameters["triton_final_response"].bool_param
        return self._read(InferResult(response)) if response.outputs else []

    @property
    def is_over(self) -> bool:
        """Whether the last response has come; what follows is the stream's end."""
        return self._ended or self._refusal is not None

    def check_ended(self) -> None:
        """To be called when the stream has ended.

        Raises:
            RequestError: the server refused or failed the request.
            ServerUnavailableError: the stream ended before its last response.
        """
        if self._refusal is not None:
            raise self._refusal
        if not self._ended:
            raise ServerUnavailableError(f"{self._url} ended the answer before it was complete")

    def explain(self, error: grpc.RpcError, tls: TLS | None) -> TandemClientError:
        """What a user can do something about, from an error of the connection."""
        if self._refusal is not None:
            return self._refusal
        return explain(error, self._url, tls, answered=self._answered)


def explain(
    error: grpc.RpcError, url: str, tls: TLS | None, *, answered: bool = False
) -> TandemClientError:
    """What a user can do something about, from an error of the connection; takes seconds at most.

    Args:
        url: the server's address.
        tls: how it was asked.
        answered: whether anything came before.
    """
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimeoutError("the answer was not complete in time")
    # How a proxy breaks an answer off whose server has died.
    is_reset = code is grpc.StatusCode.INTERNAL and "RST_STREAM" in (details or "")
    if code is not grpc.StatusCode.UNAVAILABLE and not is_reset:
        return RequestError(f"{code.name}: {details}", _CODES.get(code, "INTERNAL"))
    # Everything but a connection that never was: a server, or the one behind a proxy, is lost.
    if answered or not _is_unreachable(details or ""):
        return ServerUnavailableError(f"lost the connection to {url}: {details}")
    return ServerUnavailableError(
        diagnose(url, tls)
        or f"no server answers at {url}: start one with `make serve`, or give the address of its "
        "gRPC service"
    )


def _is_unreachable(details: str) -> bool:
    return "failed to connect" in details.lower() or "DNS resolution" in details


_CODES = {
    grpc.StatusCode.NOT_FOUND: "NOT_FOUND",
    grpc.StatusCode.INVALID_ARGUMENT: "INVALID_ARG",
    grpc.StatusCode.CANCELLED: "CANCELLED",
}
# What Triton itself says; it gives no code within a stream.
_TRITON_TEXTS = {
    "unknown model": "NOT_FOUND",
    "not found": "NOT_FOUND",
    "is not ready": "UNAVAILABLE",
    # "Stub process 'tandem_0_0' is not healthy.": the model's process is dead.
    "is not healthy": "UNAVAILABLE",
    "maximum queue size": "UNAVAILABLE",
    "timeout expired": "UNAVAILABLE",
}


def refusal(message: str) -> RequestError:
    """The error that the server put into a stream."""
    text = re.sub(r"^\[request id: [^]]*\] ", "", message)
    code, colon, rest = text.partition(": ")
    if colon and code.isupper() and " " not in code:
        return RequestError(rest, code)
    codes = [code for part, code in _TRITON_TEXTS.items() if part in text]
    return RequestError(text, codes[0] if codes else "INVALID_ARG")


def ask_for_text(
    url: str, model: str, prompt: Prompt, stream: bool, options: Options
) -> Exchange[Chunk]:
    """One request for text.

    Raises:
        RequestError: the prompt has characters that UTF-8 can't hold.
    """
    request = make_request(model, prompt, stream=stream, options=options)
    return Exchange(url, request, read_chunks, make_metadata(prompt, options))


def make_request(model: str, prompt: Prompt, *, stream: bool, options: Mapping[str, object]) -> Any:
    """The message for one request, each of its tensors of shape `[1, n]`.

    Raises:
        RequestError: the prompt is an empty list, or has characters that UTF-8 can't hold.
    """
    if not prompt and not isinstance(prompt, str):
        raise RequestError("the prompt is an empty list: give at least one token or message")
    sampling: dict[str, Any] = {
        name: value for name, value in options.items() if value is not None and name not in ENVELOPE
    }
    tools = sampling.pop("tools", None)
    texts = {"sampling_parameters": _to_json(sampling)}
    if tools is not None:
        texts["tools"] = _to_json(tools)
    token_ids: list[int] = []
    if isinstance(prompt, str):
        texts["text_input"] = prompt
    elif all(isinstance(item, int) for item in prompt):
        token_ids = cast("list[int]", list(prompt))
    else:
        texts["messages"] = _to_json(list(prompt))
    request = service_pb2.ModelInferRequest(model_name=model, id=str(options.get("request_id", "")))
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, text in texts.items():
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{_LABELS.get(name, name)} is not valid UTF-8: {error}") from None
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1, 1])
        tensor.contents.bytes_contents.append(content)
    if token_ids:
        tensor = request.inputs.add(name="input_ids", datatype="INT32", shape=[1, len(token_ids)])
        try:
            tensor.contents.int_contents.extend(token_ids)
        except ValueError as error:
            raise RequestError(f"the prompt's token ids must be 32-bit numbers: {error}") from None
    tensor = request.inputs.add(name="stream", datatype="BOOL", shape=[1, 1])
    tensor.contents.bool_contents.append(stream)
    return request


_LABELS = {"text_input": "the prompt", "messages": "the prompt"}


def _to_json(value: Any) -> str:
    # Unescaped, so that half a surrogate, which is no character, is found here.
    return json.dumps(value, ensure_ascii=False)


def read_chunks(result: InferResult) -> list[Chunk]:
    """A response's chunks, one for each sequence that it is about."""
    names = [output.name for output in result.get_response().outputs]
    outputs = {name: result.as_numpy(name).tolist() for name in names}
    rows = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
    return [_chunk(row) for row in rows]


def _chunk(outputs: dict[str, Any]) -> Chunk:
    counts = {name: outputs[name] for name in _COUNTS}
    token_ids = [token_id for token_id in outputs.get("output_ids", ()) if token_id >= 0]
    return Chunk(
        text=outputs["text_output"].decode(),
        index=outputs["sequence_index"][0],
        finish_reason=outputs["finish_reason"].decode() or None,
        stop_reason=outputs.get("stop_reason", b"").decode() or None,
        token_ids=tuple(token_ids),
        is_accepted_draft=tuple(outputs.get("is_accepted_draft", ())[: len(token_ids)]),
        logprobs=tuple(json.loads(outputs.get("logprobs", b"[]"))),
        prompt_logprobs=tuple(json.loads(outputs.get("prompt_logprobs", b"[]"))),
        seed=outputs.get("seed"),
        num_cached_tokens=outputs.get("num_cached_tokens"),
        acceptance_histogram=_histogram(outputs.get("acceptance_histogram")),
        time_to_first_token=outputs.get("time_to_first_token"),
        total_time=outputs.get("total_time"),
        **counts,
    )


def _histogram(padded: list[int] | None) -> tuple[int, ...] | None:
    return None if padded is None else tuple(count for count in padded if count >= 0)


_COUNTS = (
    "accepted_text_length",
    "num_input_tokens",
    "num_output_tokens",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
)
