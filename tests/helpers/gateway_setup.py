"""A gateway in this process, before a server that is made up."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import requests
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from tandem_client import TLS
from tandem_gateway.app import create_app
from tandem_gateway.limits import Limits
from tandem_gateway.server import make_server

KEY = "secret"
TIMEOUT = 20
_COUNTS = (
    "accepted_text_length",
    "num_input_tokens",
    "num_output_tokens",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each prompt with itself, a word a token, every `seconds`; "..." without end.

    Attributes:
        state: "alive"; "dead", as Triton is when the model's process is: nothing more comes, and
            what is sent is refused a second later; "stopped": nothing comes; "draining".
        refusal: what is answered to every prompt, if anything.
        models: their backends by name.
        chat_models: those that have a chat template.
        template: theirs.
        text: what is answered to messages instead of themselves, in pieces of three letters.
        dead_models: those whose process is dead.
        keeps_models_secret: whether it lets nobody ask which there are.
        asked: the models that prompts were for.
        options: the sampling parameters of the last prompt.
    """

    def __init__(self) -> None:
        self.models = {"tandem": "tandem"}
        self.chat_models: set[str] = set()
        self.template = "{{ messages }}"
        self.text = ""
        self.dead_models: set[str] = set()
        self.keeps_models_secret = False
        self.asked: list[str] = []
        self.num_indexed = 0
        self.state = "alive"
        self.refusal = ""
        self.options: dict[str, Any] = {}
        self.seconds = 0.0
        self.num_pings = self.num_running = 0
        self.url = ""

    async def ModelReady(  # noqa: N802
        self, request: Any, context: Any
    ) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    async def RepositoryIndex(  # noqa: N802
        self, request: Any, context: Any
    ) -> Any:
        self.num_indexed += 1
        if self.keeps_models_secret:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied")
        answer = service_pb2.RepositoryIndexResponse()
        for name in self.models:
            answer.models.add(name=name, version="1", state="READY")
        return answer

    async def ModelConfig(  # noqa: N802
        self, request: Any, context: Any
    ) -> Any:
        answer = service_pb2.ModelConfigResponse()
        answer.config.backend = self.models[request.name]
        return answer

    async def ModelStreamInfer(  # noqa: N802
        self, requests: Any, context: Any
    ) -> AsyncIterator[Any]:
        answers: asyncio.Queue[Any] = asyncio.Queue(8)
        tasks: list[asyncio.Task[None]] = []

        async def read() -> None:
            async for request in requests:
                task = asyncio.create_task(self._answer(request, answers))
                tasks.append(task)
            await asyncio.gather(*tasks)
            await answers.put(None)

        tasks.append(reader := asyncio.create_task(read()))
        tasks.remove(reader)
        self.num_running += 1
        try:
            while (answer := await answers.get()) is not None:
                yield answer
        finally:
            self.num_running -= 1
            for task in (reader, *tasks):
                task.cancel()

    async def _answer(self, request: Any, answers: asyncio.Queue[Any]) -> None:
        is_ping = "tandem_ping" in request.parameters
        self.num_pings += is_ping
        is_dead = self.state == "dead" or request.model_name in self.dead_models
        if "tandem_query" in request.parameters and not is_dead:
            text = json.dumps(self._tell(request))
            await answers.put(_chunk(request, text, final=True))
            return
        if not is_ping:
            self.asked.append(request.model_name)
        if self.state == "stopped":
            await asyncio.Event().wait()
        if is_dead:
            await asyncio.sleep(1)
            await answers.put(_failure(request, "Stub process 'tandem_0_0' is not healthy."))
        elif is_ping and self.state == "draining":
            await answers.put(_failure(request, "UNAVAILABLE: the server is shutting down"))
        elif is_ping:
            await answers.put(_chunk(request, "", final=True))
        elif self.refusal:
            await answers.put(_failure(request, self.refusal))
        else:
            await self._write(request, answers)

    def _tell(self, request: Any) -> dict[str, Any]:
        """What was made up; a token for each character; or "text"."""
        inputs = {tensor.name: tensor.contents for tensor in request.inputs}
        text = inputs["text_input"].bytes_contents[0].decode() if "text_input" in inputs else ""
        answers = {
            "describe": self._description(request.model_name),
            "tokenize": {"token_ids": [ord(letter) for letter in text], "token_strs": list(text)},
            "detokenize": {"text": "text"},
        }
        return answers[request.parameters["tandem_query"].string_param]

    def _description(self, model: str) -> dict[str, Any]:
        return {
            "chat_template": self.template if model in self.chat_models else None,
            "max_model_len": 2048,
            "vocab_size": 256,
            "dtype": "float32",
            "eos_token_ids": [1],
            "eos_tokens": ["</s>"],
            "drafters": {"ngram": 4},
            "default_drafter": "ngram",
        }

    async def _write(self, request: Any, answers: asyncio.Queue[Any]) -> None:
        inputs = {tensor.name: tensor.contents for tensor in request.inputs}
        self.options = json.loads(inputs["sampling_parameters"].bytes_contents[0])
        prompt = (inputs.get("text_input") or inputs["messages"]).bytes_contents[0].decode()
        self.prompt = prompt
        words = prompt.split(" ")
        if self.text and "messages" in inputs:
            words = [self.text[n : n + 3] for n in range(0, len(self.text), 3)]
        left = -1 if prompt == "..." else len(words)
        while left:
            await asyncio.sleep(self.seconds)
            if self.state in ("dead", "stopped"):
                await asyncio.Event().wait()
            word = "x" * 20_000 if left < 0 else words[-left]
            left -= 1
            await answers.put(_chunk(request, word, final=left == 0))


def _failure(request: Any, message: str) -> Any:
    answer = service_pb2.ModelStreamInferResponse(error_message=message)
    answer.infer_response.id = request.id
    answer.infer_response.parameters["triton_final_response"].bool_param = True
    return answer


def _chunk(request: Any, text: str, *, final: bool) -> Any:
    answer = service_pb2.ModelStreamInferResponse()
    response = answer.infer_response
    response.id = request.id
    response.parameters["triton_final_response"].bool_param = final
    if not text:
        return answer
    texts = {"text_output": text, "finish_reason": "stop" if final else ""}
    for name, value in texts.items():
        response.outputs.add(name=name, datatype="BYTES", shape=[1])
        content = serialize_byte_tensor(np.array([value.encode()], np.object_)).item()
        response.raw_output_contents.append(content)
    counts = dict.fromkeys(_COUNTS, 0) | {"num_input_tokens": 5, "num_output_tokens": 1}
    for name, number in counts.items():
        response.outputs.add(name=name, datatype="INT32", shape=[1])
        response.raw_output_contents.append(struct.pack("<i", number))
    response.outputs.add(name="sequence_index", datatype="INT32", shape=[1, 1])
    response.raw_output_contents.append(struct.pack("<i", 0))
    return answer


@contextmanager
def fake_triton(credentials: grpc.ServerCredentials | None = None) -> Iterator[FakeTriton]:
    """One that listens, on a thread of its own; with TLS, if there are credentials."""
    fake, started, loop = FakeTriton(), threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
        port = (
            server.add_secure_port("127.0.0.1:0", credentials)
            if credentials
            else server.add_insecure_port("127.0.0.1:0")
        )
        fake.url = f"127.0.0.1:{port}"
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(0)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@contextmanager
def gateway(
    url: str,
    *keys: str,
    models: Sequence[str] = (),
    tls: TLS | None = None,
    origins: Sequence[str] = (),
    strict: bool = False,
    any_model: bool = False,
    **limits: Any,
) -> Iterator[str]:
    """One that listens, on a thread of its own; its address is given."""
    app = create_app(
        url,
        models,
        tls=tls,
        api_keys=keys,
        allowed_origins=origins,
        limits=Limits(**limits),
        strict=strict,
        any_model=any_model,
    )
    server = make_server(app, "127.0.0.1", 0, drain_seconds=1)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def ask(url: str, prompt: Any = "a b c", key: str = KEY, **more: Any) -> requests.Response:
    """A completion."""
    body = {"model": "tandem", "prompt": prompt, **more}
    return post(url, json.dumps(body), key)


def post(
    url: str, body: str | bytes, key: str = KEY, path: str = "completions"
) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return requests.post(f"{url}/v1/{path}", data=body, headers=headers, timeout=TIMEOUT)


def error_of(answer: requests.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(TIMEOUT)
    return connection


def head(*lines: str, path: str = "/v1/completions", key: str = KEY) -> bytes:
    """A request up to its body."""
    first = (f"POST {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {key}")
    return "\r\n".join([*first, "Content-Type: application/json", *lines, "", ""]).encode()


def read_to_end(connection: socket.socket) -> tuple[bytes, float]:
    """All that comes until the gateway closes, and after how many seconds it did."""
    started, data = time.monotonic(), b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data, time.monotonic() - started


def read_answer(connection: socket.socket) -> bytes:
    """One answer, of a connection that may stay open."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    length = int((re.search(rb"(?i)content-length: (\d+)", data) or [b"", b"0"])[1])
    while len(data.partition(b"\r\n\r\n")[2]) < length:
        data += connection.recv(65536)
    return data


def metric(url: str, name: str, key: str = KEY) -> float:
    """The sum of a metric's series."""
    headers = {"Authorization": f"Bearer {key}"}
    page = requests.get(f"{url}/metrics", headers=headers, timeout=TIMEOUT).text
    lines = [line for line in page.splitlines() if line.startswith(f"tandem_gateway_{name}")]
    return sum(float(line.split()[-1]) for line in lines)
