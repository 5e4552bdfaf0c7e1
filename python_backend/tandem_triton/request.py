"""One Triton request: what it asks for, and its responses."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import triton_python_backend_utils as pb_utils

from tandem import (
    DeadlineExceededError,
    Delta,
    Engine,
    EngineStoppedError,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    Sequence,
    TandemError,
)
from tandem.requests.end_of_turn import end_of_turn_ids
from tandem.requests.options import (
    RequestOptions,
    parse_json,
    parse_options,
    with_bias,
    with_stops,
)
from tandem_options import NAMES, UnknownNames
from tandem_triton.choice import Choice, output_tensor
from tandem_triton.inputs import read_prompt, read_tensor
from tandem_triton.metrics import MetricsExporter

logger = logging.getLogger("tandem")
_unknown_names = UnknownNames(logger)

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_MAX_SEED = 2**64 - 1
# Of what a client sent, answers and the log repeat no more.
MAX_MESSAGE, _MAX_ID = 2000, 128


class Request:
    """One Triton request: what it asks for, its sequences, and where its responses go."""

    def __init__(self, request: Any, metrics: MetricsExporter) -> None:
        arrived_at = time.monotonic()
        self._metrics = metrics
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._done = False
        self._choices: dict[Sequence, Choice] = {}
        timeout = request.timeout()  # microseconds, 0 for none
        self._deadline = arrived_at + timeout / 1e6 if timeout else float("inf")
        self._arrived_at = self._asked_at = arrived_at
        self._id = self._trace_id = ""

    def read(self, request: Any) -> None:
        """Reads what it asks for, but for the prompt.

        Raises:
            InvalidRequestError: naming the input or parameter.
        """
        self._id = _sent("the request's id", request.request_id)
        self._trace_id = trace_id(request)
        self._options = _options(request)
        self._id = self._id or self._options.request_id
        _unknown_names.warn(self._options.unknown)

    @property
    def has_guide(self) -> bool:
        """Whether a guide has to be compiled, which may take seconds."""
        return self._options.params.guide is not None

    def make_sequences(self, request: Any, engine: Engine) -> list[Sequence]:
        """Makes the sequences that it asks for, once it was read.

        Raises:
            InvalidRequestError: naming the input or parameter.
        """
        assert engine.tokenizer is not None
        self._engine, options = engine, self._options
        prompt, is_chat = read_prompt(request, engine.tokenizer, engine.text_limits, options.prompt)
        engine.text_limits.check_text("embedding_bias_words", "".join(options.embedding_bias_words))
        params = with_bias(options.params, _word_bias(options, engine.tokenizer))
        if is_chat and not params.ignore_eos:
            params = with_stops(params, end_of_turn_ids(engine.tokenizer) - engine.eos_token_ids)
        drafter, echo = options.drafter, prompt if isinstance(prompt, str) else ""
        for index in range(options.n):
            sequence = engine.make_sequence(
                prompt,
                params,
                drafter=drafter,
                num_speculative_tokens=options.num_speculative_tokens,
                cache_salt=options.cache_salt,
            )
            if options.n > 1 and not self._choices:  # the seed that was drawn is that of the first
                params = dataclasses.replace(params, seed=sequence.seed)
            elif options.n > 1:
                sequence.seed = (sequence.seed + index) & _MAX_SEED
            # What was drawn is drawn for all, and what was tokenized is not tokenized again.
            drafter, prompt = sequence.drafter, sequence.token_ids
            if options.exclude_input_in_output:
                echo = ""
            elif not echo:
                echo = str(engine.tokenizer.decode(sequence.token_ids))
            self._choices[sequence] = Choice(
                index, sequence, engine.tokenizer, engine.config.block_size, self._arrived_at, echo
            )
        return list(self._choices)

    def reason_to_end(self, ask_seconds: float) -> TandemError | None:
        """Why the request should be given up: its client is gone, or its time is over.

        Args:
            ask_seconds: for how long the server's last answer holds.
        """
        now = time.monotonic()
        if now > self._deadline:
            return DeadlineExceededError("the request's timeout passed before it was done")
        if now - self._asked_at < ask_seconds:
            return None
        self._asked_at = now
        with self._lock:
            # Asking after the last response would crash the server.
            if not self._done and self._sender.is_cancelled():
                return RequestCancelledError("the request was cancelled")
        return None

    def fail(self, error: TandemError) -> None:
        """Ends the request with an error."""
        if self._done:
            return
        reason = _REASONS.get(type(error), "error")
        self._metrics.count("request_failure_total", reason=reason)
        # Within a gRPC stream Triton passes the text on, but not the code.
        code = getattr(pb_utils.TritonError, error.code)
        message = str(error)[:MAX_MESSAGE]
        triton_error = pb_utils.TritonError(f"{error.code}: {message}", code)
        self._send(pb_utils.InferenceResponse(error=triton_error), _FINAL)
        self._log_end(reason, error=message)

    @property
    def streams(self) -> bool:
        """Whether it gets responses before its end."""
        return self._options.stream

    def has_begun(self, sequence: Sequence) -> bool:
        """Whether the client has a response of the sequence."""
        return self._choices[sequence].has_begun

    def deliver(self, news: Items[tuple[float, Delta]]) -> None:
        """Adds what steps brought to one of the sequences and sends what is ready.

        With `stream`, that is the new text; without, all sequences once the last has ended. An
        error of one sequence ends the others.

        Args:
            news: each with its time (`time.monotonic`).
        """
        if self._done:
            return
        sequence, reason = news[-1][1].sequence, news[-1][1].finish_reason
        has_failed = reason in (FinishReason.CANCELLED, FinishReason.ERROR)
        choice = self._choices[sequence]
        if has_failed:  # which brought nothing
            news = news[:-1]
        if news:
            choice.add(news)
        if reason is not None and not has_failed:
            choice.observe(self._metrics)
        is_last = all(each.ended for each in self._choices.values())
        if self._options.stream and (choice.text or choice.ended):
            self._respond([choice], is_last)
        elif is_last:
            self._respond(list(self._choices.values()), is_last)
        if has_failed:
            assert sequence.error is not None
            self.fail(sequence.error)
            for each in self._choices:
                self._engine.cancel(each)

    def _respond(self, choices: list[Choice], is_last: bool) -> None:
        columns: dict[str, list[Any]] = {}
        for choice in choices:
            for name, value in choice.take(self._options).items():
                columns.setdefault(name, []).append(value)
        tensors = [output_tensor(name, values) for name, values in columns.items()]
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        self._send(response, _FINAL if is_last else 0)
        if is_last:
            reasons = {s.finish_reason.value for s in self._choices if s.finish_reason}
            self._log_end("+".join(sorted(reasons)))

    def _log_end(self, outcome: str, **more: str) -> None:
        """A line of JSON, with what connects it to the client's log and to the trace."""
        counted = {
            name: sum(getattr(sequence, name) for sequence in self._choices)
            for name in ("num_output_tokens", "num_draft_tokens", "num_accepted_tokens")
        }
        first = next(iter(self._choices), None)
        entry = {
            "event": "request",
            "request_id": self._id[:_MAX_ID],
            "trace_id": self._trace_id,
            "outcome": outcome,
            "seconds": round(time.monotonic() - self._arrived_at, 4),
            "drafter": first.drafter if first else "",
            "num_input_tokens": first.num_prompt_tokens if first else 0,
            **counted,
            **more,
        }
        logger.info("%s", json.dumps(entry, ensure_ascii=False))

    def _send(self, response: Any, flags: int) -> None:
        with self._lock:
            assert not self._done, "a request got a response after its last"
            self._done = flags == _FINAL
            self._sender.send(response, flags)


# Errors -> how `/metrics` names them.
_REASONS: dict[type[TandemError], str] = {
    InvalidRequestError: "invalid",
    RequestCancelledError: "cancelled",
    DeadlineExceededError: "timeout",
    EngineStoppedError: "stopped",
    QueueFullError: "queue_full",
}


# --- reading


def trace_id(request: Any) -> str:
    """The trace that the request belongs to: of a forwarded header, or of Triton's own tracing.

    Empty if there is none. The format is W3C's: version-trace-parent-flags. The header comes first:
    in one of a hundred requests over gRPC, Triton 2.51 reads it wrongly and begins another trace.
    """
    for context in (_parameters(request), json.loads(request.trace().get_context() or "{}")):
        parts = str(context.get("traceparent", "")).split("-")
        if len(parts) == 4 and len(parts[1]) == 32:
            return parts[1]
    return ""


def _sent(what: str, read: Callable[[], str]) -> str:
    """A text that the client sent beside its tensors."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{what} is not valid UTF-8: {error}") from None


def _parameters(request: Any) -> dict[str, Any]:
    return dict(parse_json("parameters", _sent("a parameter", request.parameters) or "{}"))


def request_parameters(request: Any) -> dict[str, Any]:
    """The parameters that a client sent, without the server's own and headers that it forwards.

    Raises:
        InvalidRequestError: they can't be read.
    """
    return {
        name: value
        for name, value in _parameters(request).items()
        if not name.startswith("triton_") and name not in ("id", "traceparent")
    }


def _options(request: Any) -> RequestOptions:
    """Tensors win over `sampling_parameters`, and that over request parameters."""
    tensors = {}
    for tensor in request.inputs():
        name = tensor.name()
        if name in (*NAMES, "sampling_parameters"):
            tensors[name] = read_tensor(tensor)
    text = tensors.pop("sampling_parameters", None)
    return parse_options(
        tensors,
        parse_json("sampling_parameters", text) if text else {},
        request_parameters(request),
    )


def _word_bias(options: RequestOptions, tokenizer: Any) -> dict[int, float]:
    bias: dict[int, float] = {}
    pairs: Items[tuple[str, float]] = list(
        zip(options.embedding_bias_words, options.embedding_bias_weights, strict=True)
    )
    for word, weight in pairs:
        for token_id in tokenizer(word, add_special_tokens=False)["input_ids"]:
            bias[token_id] = bias.get(token_id, 0.0) + weight
    return bias
