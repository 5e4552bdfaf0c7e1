"""One Triton request: what it asks for, and its responses."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from tandem import Delta, Engine, FinishReason, InvalidRequestError, Sequence, TandemError
from tandem.options import RequestOptions, parse_json, parse_options
from tandem.text import Detokenizer

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Request:
    """One Triton request: what it asks for, its text so far, and where its responses go."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._detokenizer: Detokenizer | None = None
        self._done = False
        self._text = ""
        self._accepted_text_length = 0
        self._counts: Counter[str] = Counter()  # since the last response, by output
        self._stream = False

    def read(self, request: Any, engine: Engine) -> Sequence:
        """Makes the sequence that the request asks for.

        Raises:
            InvalidRequestError: naming the input or parameter.
        """
        prompt = _string(request, "text_input")
        assert prompt is not None, "Triton lets no request without text_input through"
        options = _options(request)
        assert engine.tokenizer is not None
        self._detokenizer = Detokenizer(engine.tokenizer)
        self._stream = options.stream
        return engine.make_sequence(
            prompt,
            options.params,
            drafter=options.drafter,
            num_speculative_tokens=options.num_speculative_tokens,
        )

    def is_cancelled(self) -> bool:
        """Whether the client went away. Asking after the last response would crash the server."""
        with self._lock:
            return not self._done and bool(self._sender.is_cancelled())

    def fail(self, error: TandemError) -> None:
        """Ends the request with an error."""
        code = getattr(pb_utils.TritonError, error.code)
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)), _FINAL)

    def deliver(self, delta: Delta) -> None:
        """Adds what a step brought and sends it, if the client streams and there is text."""
        assert self._detokenizer is not None
        split = delta.num_accepted_tokens
        accepted = self._detokenizer.push(delta.token_ids[:split])
        text = accepted + self._detokenizer.push(delta.token_ids[split:])
        if delta.finish_reason is not None:
            text += self._detokenizer.flush()
        if self._stream:
            # Text is held back only while there is none, so all of it is this step's.
            self._accepted_text_length = len(accepted)
        self._text += text
        self._counts.update(
            num_output_tokens=len(delta.token_ids),
            num_drafts=int(delta.num_draft_tokens > 0),
            num_draft_tokens=delta.num_draft_tokens,
            num_accepted_tokens=delta.num_accepted_tokens,
        )
        if delta.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
            assert delta.sequence.error is not None
            self.fail(delta.sequence.error)
        elif delta.finish_reason is not None:
            self._send(self._response(delta.sequence, delta.finish_reason.value), _FINAL)
        elif self._stream and self._text:
            self._send(self._response(delta.sequence, ""))

    def _response(self, sequence: Sequence, finish_reason: str) -> Any:
        response = pb_utils.InferenceResponse(
            output_tensors=[
                _tensor("text_output", self._text.encode(), np.object_),
                _tensor("finish_reason", finish_reason.encode(), np.object_),
                _tensor("num_input_tokens", sequence.num_prompt_tokens, np.int32),
                *(_tensor(name, count, np.int32) for name, count in self._counts.items()),
                _tensor("accepted_text_length", self._accepted_text_length, np.int32),
            ]
        )
        self._text, self._accepted_text_length = "", 0
        self._counts.clear()
        return response

    def _send(self, response: Any, flags: int = 0) -> None:
        with self._lock:
            assert not self._done, "a request got a response after its last"
            self._done = flags == _FINAL
            self._sender.send(response, flags)


def _tensor(name: str, value: object, dtype: Any) -> Any:
    return pb_utils.Tensor(name, np.array([[value]], dtype=dtype))


def _input(request: Any, name: str) -> Any:
    """The one element of an input tensor, or None if it wasn't sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise InvalidRequestError(f"{name} must hold one element, got {len(values)}")
    return values[0]


def _string(request: Any, name: str) -> str | None:
    value = _input(request, name)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name} is not valid UTF-8: {error}") from error


def _options(request: Any) -> RequestOptions:
    """Tensors win over request parameters, of which the server adds some of its own."""
    parameters = {
        name: value
        for name, value in json.loads(request.parameters() or "{}").items()
        if not name.startswith("triton_")
    }
    text = _string(request, "sampling_parameters")
    stream = _input(request, "stream")
    return parse_options(
        {} if stream is None else {"stream": bool(stream)},
        parse_json("sampling_parameters", text) if text else {},
        parameters,
    )
