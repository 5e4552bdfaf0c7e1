"""Tandem as a Triton backend: turns requests into sequences and what each step adds into responses.

The only file that knows Triton. `execute()` blocks while the engine is full, which leaves the
surplus in Triton's queue, where its limits, timeouts and priorities act. Then it returns a
coroutine, which steps the engine for all running sequences until its own requests are done. All
responses leave from one thread, so that sending never holds up a step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers.utils import logging as transformers_logging

from tandem import (
    Delta,
    Engine,
    EngineConfig,
    EngineStoppedError,
    FinishReason,
    InvalidRequestError,
    Sequence,
    TandemError,
)
from tandem.options import RequestOptions, parse_json, parse_options
from tandem.text import Detokenizer

logger = logging.getLogger("tandem")

# A newer server asks the model whether it is ready over the channel that a blocked execute()
# holds, and waits 5 s for the answer.
_MAX_BLOCK_SECONDS = 3.0
_WATCH_SECONDS = 0.05
_METRICS = {
    "engine_steps_total": "Verifier passes",
    "prompt_tokens_total": "Prompt tokens of accepted requests",
    "generation_tokens_total": "Generated tokens",
    "num_preemptions_total": "Sequences freed and computed again because blocks ran out",
    "num_requests_running": "Sequences in the continuous batch",
    "num_requests_waiting": "Sequences that the engine has queued",
    "kv_cache_blocks": "Blocks of the KV cache",
    "kv_cache_blocks_used": "Blocks of the KV cache that belong to a sequence",
    "spec_decode_num_drafts_total": "Rounds in which a drafter proposed tokens",
    "spec_decode_num_draft_tokens_total": "Draft tokens that were verified",
    "spec_decode_num_accepted_tokens_total": "Draft tokens that were accepted",
}
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class _ServerLog(logging.Handler):
    """Writes the package's log to the server's."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(self.format(record))
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(self.format(record))
        else:
            pb_utils.Logger.log_info(self.format(record))


class Request:
    """One Triton request: what it asks for, its text so far, and where its responses go."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._detokenizer: Detokenizer | None = None
        self._done = False
        self._text = ""
        self._accepted_text_length = 0
        self._num_output_tokens = self._num_draft_tokens = self._num_accepted_tokens = 0
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
        self._num_output_tokens += len(delta.token_ids)
        self._num_draft_tokens += delta.num_draft_tokens
        self._num_accepted_tokens += delta.num_accepted_tokens
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
                _tensor("num_output_tokens", self._num_output_tokens, np.int32),
                _tensor("num_draft_tokens", self._num_draft_tokens, np.int32),
                _tensor("num_accepted_tokens", self._num_accepted_tokens, np.int32),
                _tensor("accepted_text_length", self._accepted_text_length, np.int32),
            ]
        )
        self._text, self._accepted_text_length = "", 0
        self._num_output_tokens = self._num_draft_tokens = self._num_accepted_tokens = 0
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


class _Metrics:
    """Shows the engine's counters and load on the server's `/metrics`."""

    def __init__(self, engine: Engine, args: dict[str, str]) -> None:
        self._engine = engine
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._shown: dict[tuple[str, str], float] = {}
        self._off = False

    def update(self) -> None:
        """Sends what has changed since the last time; each costs a message to the server."""
        stats, load = self._engine.stats, self._engine.load
        self._show("engine_steps_total", stats.num_steps)
        self._show("prompt_tokens_total", stats.num_prompt_tokens)
        self._show("generation_tokens_total", stats.num_generation_tokens)
        self._show("num_preemptions_total", load.num_preemptions)
        self._show("num_requests_running", load.num_running)
        self._show("num_requests_waiting", load.num_waiting)
        self._show("kv_cache_blocks", load.num_blocks)
        self._show("kv_cache_blocks_used", load.num_blocks_used)
        for name, drafter in list(self._engine.drafter_stats.items()):
            self._show("spec_decode_num_drafts_total", drafter.num_drafts, name)
            self._show("spec_decode_num_draft_tokens_total", drafter.num_draft_tokens, name)
            self._show("spec_decode_num_accepted_tokens_total", drafter.num_accepted_tokens, name)

    def _show(self, name: str, value: float, drafter: str = "") -> None:
        key = (name, drafter)
        if self._off or self._shown.get(key) == value:
            return
        try:
            metric = self._metrics.get(key) or self._make(name, drafter)
        except pb_utils.TritonModelException as error:
            logger.info("the server's metrics are off: %s", error)
            self._off = True
            return
        if name.endswith("_total"):
            metric.increment(value - self._shown.get(key, 0))
        else:
            metric.set(value)
        self._shown[key] = value

    def _make(self, name: str, drafter: str) -> Any:
        kinds = pb_utils.MetricFamily
        if name not in self._families:
            self._families[name] = kinds(
                name=f"tandem:{name}",
                description=_METRICS[name],
                kind=kinds.COUNTER if name.endswith("_total") else kinds.GAUGE,
            )
        labels = {**self._labels, "drafter": drafter} if drafter else self._labels
        metric = self._metrics[name, drafter] = self._families[name].Metric(labels=labels)
        return metric


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine from the version directory's `model.json` and starts the threads."""
        self._set_up_logging()
        self._engine = self._load_engine(args)
        self._metrics = _Metrics(self._engine, args)
        self._stopped: EngineStoppedError | None = None
        self._turn = asyncio.Lock()
        self._stepper = ThreadPoolExecutor(1, "tandem-step")
        self._room = threading.Condition()
        self._requests: dict[Sequence, Request] = {}
        self._outbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("tandem-send", self._send), ("tandem-watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _set_up_logging() -> None:
        if not logger.handlers:
            logger.addHandler(_ServerLog())
            logger.setLevel(logging.INFO)
        transformers_logging.disable_progress_bar()

    @staticmethod
    def _load_engine(args: dict[str, str]) -> Engine:
        path = Path(args["model_repository"]) / args["model_version"] / "model.json"
        try:
            config = EngineConfig.from_json(path)
            if args["model_instance_kind"] == "GPU" and config.device == "auto":
                device = f"cuda:{args['model_instance_device_id']}"
                config = dataclasses.replace(config, device=device)
            engine = Engine(config)
        except TandemError as error:
            # Without the traceback, which would bury what to change.
            raise pb_utils.TritonModelException(str(error)) from None
        if engine.tokenizer is None:
            raise pb_utils.TritonModelException(f"{config.verifier} has no tokenizer")
        return engine

    def execute(self, requests: list[Any]) -> Coroutine[Any, Any, None]:
        """Waits for room, queues the requests, and returns what runs them to their end."""
        self._wait_for_room()
        sequences = [self._admit(Request(request), request) for request in requests]
        return self._run([sequence for sequence in sequences if sequence is not None])

    def _wait_for_room(self) -> None:
        limit = self._engine.config.max_num_seqs
        with self._room:
            self._room.wait_for(lambda: len(self._requests) < limit, _MAX_BLOCK_SECONDS)

    def _admit(self, request: Request, triton_request: Any) -> Sequence | None:
        try:
            if self._stopped is not None:
                raise self._stopped
            sequence = request.read(triton_request, self._engine)
        except TandemError as error:
            self._outbox.put(partial(request.fail, error))
            return None
        with self._room:
            self._requests[sequence] = request
        self._engine.add(sequence)
        return sequence

    async def _run(self, sequences: list[Sequence]) -> None:
        """Takes turns with the other calls in stepping the engine, until `sequences` are done."""
        loop = asyncio.get_running_loop()
        while not all(sequence.is_finished for sequence in sequences):
            async with self._turn:
                if not all(sequence.is_finished for sequence in sequences):
                    await loop.run_in_executor(self._stepper, self._step)

    def _step(self) -> None:
        try:
            deltas = self._engine.step()
        except Exception as error:
            logger.exception("the engine failed; it takes no more requests")
            self._stop(EngineStoppedError(f"the engine failed in a step: {error!r}"))
        else:
            self._hand_out(deltas)

    def _stop(self, error: EngineStoppedError) -> None:
        """Ends all requests; on the stepping thread, so no step is running."""
        with self._room:
            self._stopped = error
        self._hand_out(self._engine.abort(error))

    def _hand_out(self, deltas: list[Delta]) -> None:
        with self._room:
            for delta in deltas:
                request = self._requests[delta.sequence]
                if delta.finish_reason is not None:
                    del self._requests[delta.sequence]
                self._outbox.put(partial(request.deliver, delta))
            self._room.notify_all()

    def _send(self) -> None:
        """Works off the outbox; a response that can't be sent harms no other."""
        while (send := self._outbox.get()) is not None:
            try:
                send()
            except Exception:
                logger.exception("a response could not be sent")

    def _watch(self) -> None:
        """Looks for clients that went away, and keeps the metrics up to date."""
        while not self._closing.wait(_WATCH_SECONDS):
            with self._room:
                live = list(self._requests.items())
            for sequence, request in live:
                if not sequence.cancelled and request.is_cancelled():
                    self._engine.cancel(sequence)
            self._metrics.update()

    def is_ready(self) -> bool:
        """Asked by servers that know it: False once the engine has failed or is shutting down."""
        return self._stopped is None

    def finalize(self) -> None:
        """Ends what still runs with an error, sends it, and stops the threads."""
        error = EngineStoppedError("the server is shutting down")
        self._stepper.submit(self._stop, error).result()
        self._stepper.shutdown()
        self._closing.set()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
