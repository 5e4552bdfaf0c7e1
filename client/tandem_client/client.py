"""Clients for a Triton server that has the Tandem backend, blocking and asyncio."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Generator
from functools import cached_property
from types import TracebackType
from typing import Any, Self, Unpack

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tandem_client.options import Options, Prompt
from tandem_client.protocol import Chunk, Completion, Exchange

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "tandem"
_READY_SECONDS = 5.0

# The stub rather than tritonclient's own streams: those allow one request at a time, lose errors
# of the connection, and leave a thread behind for each request that is cancelled.


class Client:
    """Sends requests over gRPC and waits for the answers; any number of threads may share one.

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
        self._channel = grpc.insecure_channel(url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer to `prompt`: text, token ids, or the messages of a conversation.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        start = time.monotonic()
        chunks = list(self._request(prompt, False, options))
        return Completion.of(chunks, time.monotonic() - start)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """The answer as it comes. Leaving the loop early cancels the request on the server.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        return self._request(prompt, True, options)

    def close(self) -> None:
        """Closes the connection; running requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(
        self, prompt: Prompt, stream: bool, options: Options
    ) -> Generator[Chunk, None, None]:
        exchange = Exchange(self.url, self.model, prompt, stream, options)
        call = self._stub.ModelStreamInfer(
            iter([exchange.request]), timeout=self.timeout, metadata=exchange.metadata
        )
        try:
            for message in call:
                yield from exchange.read(message)
            exchange.check_ended()
        except grpc.RpcError as error:
            raise exchange.explain(error) from error
        finally:
            call.cancel()


class AsyncClient:
    """`Client` for asyncio; used inside one event loop."""

    def __init__(
        self, url: str = DEFAULT_URL, model: str = DEFAULT_MODEL, timeout: float | None = None
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout

    @cached_property
    def _channel(self) -> Any:
        # Made at the first request: it belongs to the event loop that runs then.
        return grpc.aio.insecure_channel(self.url)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer to `prompt`; raises as `Client.generate` does."""
        start = time.monotonic()
        chunks = [chunk async for chunk in self._request(prompt, False, options)]
        return Completion.of(chunks, time.monotonic() - start)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; raises as `Client.stream` does."""
        return self._request(prompt, True, options)

    async def is_ready(self) -> bool:
        """Whether the server answers and its model takes requests."""
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        request = service_pb2.ModelReadyRequest(name=self.model)
        try:
            answer = await stub.ModelReady(request, timeout=_READY_SECONDS)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    async def close(self) -> None:
        """Closes the connection; running requests are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _request(
        self, prompt: Prompt, stream: bool, options: Options
    ) -> AsyncGenerator[Chunk, None]:
        exchange = Exchange(self.url, self.model, prompt, stream, options)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        call = stub.ModelStreamInfer(
            iter([exchange.request]), timeout=self.timeout, metadata=exchange.metadata
        )
        try:
            async for message in call:
                for chunk in exchange.read(message):
                    yield chunk
            exchange.check_ended()
        except grpc.RpcError as error:
            raise exchange.explain(error) from error
        finally:
            call.cancel()
