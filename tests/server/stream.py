"""Requests through Triton's own client libraries, and what came back."""

from __future__ import annotations

import json
import queue
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import requests
import tritonclient.grpc as grpcclient

from tandem_runtime.server import TritonServer

TIMEOUT = 60
COUNTS = ("num_output_tokens", "num_drafts", "num_draft_tokens", "num_accepted_tokens")


def inputs(prompt: str | bytes, *, stream: bool = True, **options: Any) -> list[Any]:
    """The tensors of a request, each `[1, 1]`."""
    values = {
        "text_input": (prompt.encode() if isinstance(prompt, str) else prompt, "BYTES", np.object_),
        "stream": (stream, "BOOL", bool),
        "sampling_parameters": (json.dumps(options).encode(), "BYTES", np.object_),
    }
    tensors = []
    for name, (value, kind, dtype) in values.items():
        tensor = grpcclient.InferInput(name, [1, 1], kind)
        tensor.set_data_from_numpy(np.array([[value]], dtype=dtype))
        tensors.append(tensor)
    return tensors


class Stream:
    """One gRPC stream; any number of requests may go through it."""

    def __init__(self, server: TritonServer, model: str = "tandem") -> None:
        self.client = grpcclient.InferenceServerClient(server.grpc_url)
        self.model = model
        self.events: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.events.put((result, error)))

    def send(
        self, request_id: str, prompt: str | bytes, *, timeout_us: int | None = None, **options: Any
    ) -> None:
        """Sends a request; its responses carry the id."""
        self.client.async_stream_infer(
            self.model,
            inputs(prompt, **options),
            request_id=request_id,
            timeout=timeout_us,
            enable_empty_final_response=True,
        )

    def responses(self, count: int) -> dict[str, Response]:
        """Reads until `count` requests have ended."""
        found: dict[str, Response] = {}
        deadline = time.monotonic() + TIMEOUT
        while sum(response.num_finals for response in found.values()) < count:
            result, error = self.events.get(timeout=max(0.1, deadline - time.monotonic()))
            if error is not None:
                found.setdefault(f"error-{len(found)}", Response()).fail(str(error))
                continue
            message = result.get_response()
            found.setdefault(message.id, Response()).add(result, message)
        return found

    def close(self, *, cancel: bool = True) -> None:
        """Cancels what still runs, or lets it end."""
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Response:
    """All that came back for one request."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.counts: dict[str, int] = {}
        self.finish_reason = ""
        self.error = ""
        self.num_finals = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def fail(self, error: str) -> None:
        self.error = error
        self.num_finals += 1

    def add(self, result: Any, message: Any) -> None:
        text = result.as_numpy("text_output")
        if text is not None:
            assert self.num_finals == 0, "a response came after the last"
            self.texts.append(text[0].decode())
            self.finish_reason = result.as_numpy("finish_reason")[0].decode()
            for name in COUNTS:
                value = int(result.as_numpy(name)[0])
                self.counts[name] = self.counts.get(name, 0) + value
            self.counts["num_input_tokens"] = int(result.as_numpy("num_input_tokens")[0])
        self.num_finals += message.parameters["triton_final_response"].bool_param


def metric(server: TritonServer, name: str, model: str = "tandem") -> float:
    """The sum over a metric's series of one model."""
    page = requests.get(server.metrics_url, timeout=TIMEOUT).text
    series = re.findall(rf'^tandem:{name}{{.*model="{model}".*}} (\S+)$', page, re.MULTILINE)
    return sum(float(value) for value in series)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Polls until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
