"""Clients for a Triton server that has the Tandem backend, blocking and asyncio."""

from __future__ import annotations

import queue
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Unpack

import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tandem_client.protocol import Chunk, Completion, Options, Responses, request_inputs

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "tandem"


class Client:
    """Sends requests over gRPC and waits for the answers.

    Args:
        url: the server's gRPC address, `host:port`.
        model: the model's name on the server.
        timeout: seconds that an answer may take; None for as long as it takes.
    """

    def __init__(
        self, url: str = DEFAULT_URL, model: str = DEFAULT_MODEL, timeout: float | None = None
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout

    def generate(self, prompt: str, **options: Unpack[Options]) -> Completion:
        """The whole answer to `prompt`.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        start = time.monotonic()
        chunks = list(self._request(prompt, False, options))
        return Completion.of(chunks, time.monotonic() - start)

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[Chunk]:
        """The answer as it comes. Leaving the loop early cancels the request on the server.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        return self._request(prompt, True, options)

    def _request(self, prompt: str, stream: bool, options: Options) -> Iterator[Chunk]:
        arrived: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
        responses = Responses(self.url)
        inputs = request_inputs(prompt, stream=stream, options=options)
        with triton.InferenceServerClient(self.url) as client:
            client.start_stream(
                lambda result, error: arrived.put((result, error)), stream_timeout=self.timeout
            )
            try:
                client.async_stream_infer(self.model, inputs, enable_empty_final_response=True)
                while not responses.ended:
                    chunk = responses.read(*arrived.get())
                    if chunk is not None:
                        yield chunk
            finally:
                client.stop_stream(cancel_requests=not responses.ended)


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(
        self, url: str = DEFAULT_URL, model: str = DEFAULT_MODEL, timeout: float | None = None
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout

    async def generate(self, prompt: str, **options: Unpack[Options]) -> Completion:
        """The whole answer to `prompt`; raises as `Client.generate` does."""
        start = time.monotonic()
        chunks = [chunk async for chunk in self._request(prompt, False, options)]
        return Completion.of(chunks, time.monotonic() - start)

    def stream(self, prompt: str, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """The answer as it comes; raises as `Client.stream` does."""
        return self._request(prompt, True, options)

    async def _request(self, prompt: str, stream: bool, options: Options) -> AsyncIterator[Chunk]:
        responses = Responses(self.url)
        inputs = request_inputs(prompt, stream=stream, options=options)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": self.model,
                "inputs": inputs,
                "enable_empty_final_response": True,
            }

        async with triton_aio.InferenceServerClient(self.url) as client:
            arrived = client.stream_infer(requests(), stream_timeout=self.timeout)
            try:
                while not responses.ended:
                    try:
                        result, error = await anext(arrived)
                    except InferenceServerException as failure:
                        result, error = None, failure
                    chunk = responses.read(result, error)
                    if chunk is not None:
                        yield chunk
            finally:
                arrived.cancel()
