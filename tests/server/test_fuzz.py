"""Thousands of requests that are wrong in some way, through every door, with good ones between.

TANDEM_FUZZ_REQUESTS says how many. They are the same ones in each run.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import psutil
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from junk import GATEWAY_MODEL, LETTERS, Letter
from running_gateway import running_gateway
from stream import TIMEOUT, Stream, wait_until
from tandem import Engine
from tandem_client.protocol import refusal
from tandem_runtime.server import TritonServer
from tensors import COMMON, PROMPT, offline
from test_faults import is_idle, stub_bytes

NUM_REQUESTS = int(os.environ.get("TANDEM_FUZZ_REQUESTS", "300"))
# Between good ones.
NUM_BAD = 10
# Of all requests; Triton itself refuses all of `infer`.
SHARES = {"grpc": 0.3, "generate": 0.3, "infer": 0.04, "completions": 0.18, "chat": 0.18}
STRIDE = 3
MODELS = ("tandem", "short_queue", "vllm_format")
MIB = 2**20
# Codes of Triton's as statuses of HTTP; whatever else there is would be a fault of ours.
STATUS = {"INVALID_ARG": 400, "NOT_FOUND": 404, "UNSUPPORTED": 400, "UNAVAILABLE": 503}
GRPC_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
}
NO_ANSWER = 599
FAIR = (
    # A full queue, and a request that asked for its deadline.
    "the queue is full",
    "timeout passed before it was done",
    # What Triton itself says of what isn't JSON of the right form; the model never hears of it.
    "failed to parse the request JSON buffer",
    "attempt to get members for non-object",
    "attempt to access JSON non-",
    "Unable to parse 'data': Shape does not match",
    # Of a key that holds a zero byte.
    "was not found in the JSON",
    "models with decoupled transaction policy",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + NUM_REQUESTS)]


class Doors:
    """Ways into a server, and into the gateway before it."""

    def __init__(self, server: TritonServer, gateway_url: str) -> None:
        self._server = server
        self._gateway_url = gateway_url
        self._session = requests.Session()
        self._channel = grpc.insecure_channel(server.grpc_url)
        self._stream_infer = self._channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    def close(self) -> None:
        self._session.close()
        self._channel.close()

    def send(self, letter: Letter) -> tuple[int, str]:
        """The status of the answer, and what it says if it is an error."""
        if letter.door == "grpc":
            return self._send_grpc(letter)
        headers = {"Content-Type": "application/json", **letter.headers}
        try:
            answer = self._session.post(
                self._url(letter.door), data=letter.body, headers=headers, timeout=TIMEOUT
            )
        except requests.RequestException as error:
            return NO_ANSWER, repr(error)
        if answer.status_code != 200:
            return answer.status_code, answer.text
        # An error within a stream.
        errors = [line for line in answer.text.splitlines() if line.startswith('data: {"error":')]
        return (_status(errors[0]), errors[0]) if errors else (200, "")

    def _url(self, door: str) -> str:
        if door in ("completions", "chat/completions"):
            return f"{self._gateway_url}/v1/{door}"
        return f"{self._server.http_url}/v2/models/tandem/{door}"

    def _send_grpc(self, letter: Letter) -> tuple[int, str]:
        try:
            answers = self._stream_infer(iter([letter.body]), timeout=TIMEOUT)
            errors = [each.error_message for each in answers if each.error_message]
        except grpc.RpcError as error:
            # What is no message is refused by gRPC itself, as an internal error.
            status = 400 if letter.is_spoilt and error.code() is grpc.StatusCode.INTERNAL else 500
            return GRPC_STATUS.get(error.code(), status), f"{error.code().name}: {error.details()}"
        return (_status(errors[0]), errors[0]) if errors else (200, "")

    def good_texts(self) -> list[str]:
        """What the common request is answered by each door."""
        body = {**COMMON, "text_input": PROMPT}
        generated = self._session.post(self._url("generate"), json=body, timeout=TIMEOUT)
        body = {**COMMON, "model": GATEWAY_MODEL, "prompt": PROMPT}
        completed = self._session.post(self._url("completions"), json=body, timeout=TIMEOUT)
        with Stream(self._server) as stream:
            stream.send("good", PROMPT, **COMMON)
            streamed = stream.responses(1)["good"]
        texts = [generated.json().get("text_output", generated.text), streamed.text]
        return [*texts, completed.json().get("choices", [{"text": completed.text}])[0]["text"]]


def _status(message: str) -> int:
    text = message.removeprefix('data: {"error":').lstrip(' "')
    return 500 if "server_error" in text else STATUS.get(refusal(text).code, 500)


def _fault(status: int, said: str) -> str:
    """What is wrong with an answer, if anything."""
    if status >= 500 and not any(reason in said for reason in FAIR):
        return f"status {status}"
    return next((mark for mark in ("Traceback", ".py") if mark in said), "")


def _bytes() -> int:
    """Memory of the models' processes and the gateway's."""
    children = psutil.Process().children()
    gateways = [child for child in children if "tandem_gateway.cli" in child.cmdline()]
    return stub_bytes() + sum(child.memory_info().rss for child in gateways)


def _draw(
    letters: st.SearchStrategy[Letter], share: float, knock: Callable[[Letter], None]
) -> None:
    """One of three that hypothesis makes: the next ones are often the same but for a value."""
    numbers = itertools.count()

    @settings(
        max_examples=round(NUM_REQUESTS * share) * STRIDE,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(letters)
    def draw(letter: Letter) -> None:
        if next(numbers) % STRIDE == 0:
            knock(letter)

    draw()


@contextmanager
def _doors(server: TritonServer) -> Iterator[Doors]:
    with running_gateway(server, "--model", GATEWAY_MODEL) as url:
        doors = Doors(server, url)
        try:
            yield doors
        finally:
            doors.close()


def test_junk_at_every_door(
    server: TritonServer, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [offline(engine)] * 3
    log_start = server.log_file.stat().st_size
    statuses: Counter[tuple[str, int]] = Counter()
    faults: list[Any] = []
    memory: list[int] = []
    num_good = 0

    def knock(letter: Letter) -> None:
        nonlocal num_good
        status, said = doors.send(letter)
        statuses[letter.door, status] += 1
        if fault := _fault(status, said):
            faults.append((fault, said[:300], letter.door, letter.headers, letter.body[:2000]))
        if statuses.total() % NUM_BAD == 0:
            texts = doors.good_texts()
            num_good += len(texts)
            if texts != expected:
                faults.append(("a good request", texts, letter))
        # What is allocated once and for all doesn't count.
        if statuses.total() % (NUM_REQUESTS // 4) == 0:
            memory.append(_bytes())

    with _doors(server) as doors:
        for kind, letters in LETTERS.items():
            _draw(letters, SHARES[kind], knock)
        for model in MODELS:
            wait_until(lambda model=model: is_idle(server, model))
        memory.append(_bytes())
    with server.log_file.open("rb") as file:
        file.seek(log_start)
        log = file.read().decode(errors="replace")
    gateway_log = capfd.readouterr().err
    with capfd.disabled():
        print(
            f"\n{statuses.total()} requests, {num_good} good ones, {dict(sorted(statuses.items()))}"
        )
        print(f"memory in MB: {', '.join(f'{each / MIB:.0f}' for each in memory)}")
    shown = "\n".join(str(fault) for fault in faults[:20])
    assert not faults, f"{len(faults)} faults:\n{shown}"
    assert statuses.total() >= NUM_REQUESTS
    assert num_good >= NUM_REQUESTS // NUM_BAD
    for text in (log, gateway_log):
        assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:3000]
        assert '.py"' not in text, text[text.index('.py"') - 500 :][:3000]
    assert memory[-1] < memory[0] * 1.05 + 32 * MIB
