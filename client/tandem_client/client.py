"""Clients for a Triton server that has the Tandem backend, blocking and asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from copy import copy
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tandem_client.heartbeat import TICK_SECONDS, Deaths, Heartbeat, make_ping, says_ready
from tandem_client.options import Options, Prompt
from tandem_client.protocol import Chunk, Completion, Exchange, ask_for_text, explain
from tandem_client.queries import (
    Description,
    Tokens,
    TokensOptions,
    describe,
    detokenize,
    tokenize,
)
from tandem_client.repository import INDEX, config_request, is_tandem, ready_models, untold
from tandem_client.tls import TLS

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "tandem"
_T = TypeVar("_T")
_READY_SECONDS = 5.0

# The stub rather than tritonclient's own streams: those allow one request at a time, lose errors
# of the connection, and leave a thread behind for each request that is cancelled.


class Client:
    """Sends requests over gRPC and waits for the answers; any number of threads may share one.

    Args:
        url: the server's gRPC address, `host:port`.
        model: the model's name on the server.
        timeout: seconds that an answer may take; None for as long as it takes.
        tls: how to speak TLS with the server; None where it listens without.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = DEFAULT_MODEL,
        timeout: float | None = None,
        tls: TLS | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout
        self.tls = tls
        self._channel = (
            grpc.secure_channel(url, tls.credentials()) if tls else grpc.insecure_channel(url)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._deaths = Deaths()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer to `prompt`: text, token ids, or the messages of a conversation.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        start = time.monotonic()
        chunks = list(self._run(ask_for_text(self.url, self.model, prompt, False, options)))
        return Completion.of(chunks, time.monotonic() - start)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """The answer as it comes. Leaving the loop early cancels the request on the server.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        return self._run(ask_for_text(self.url, self.model, prompt, True, options))

    def for_model(self, model: str) -> Client:
        """A client of another model of the server, on the same connection."""
        other = copy(self)
        other.model, other._deaths = model, Deaths()
        return other

    def describe(self) -> Description:
        """What the model is.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        return self._only(describe(self.url, self.model))

    def tokenize(self, prompt: Prompt, **options: Unpack[TokensOptions]) -> Tokens:
        """The tokens that `prompt` is to the model.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        return self._only(tokenize(self.url, self.model, prompt, options))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        return self._only(detokenize(self.url, self.model, token_ids))

    def models(self) -> list[str]:
        """The names of the server's Tandem models that are loaded.

        Raises:
            TandemClientError: see `tandem_client.errors`.
        """
        try:
            index = self._stub.RepositoryIndex(INDEX, timeout=_READY_SECONDS)
            return [
                name
                for name in ready_models(index)
                if is_tandem(self._stub.ModelConfig(config_request(name), timeout=_READY_SECONDS))
            ]
        except grpc.RpcError as error:
            raise untold(explain(error, self.url, self.tls)) from error

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

    def _only(self, exchange: Exchange[_T]) -> _T:
        # To the stream's end; see `Exchange.read`.
        (answer,) = self._run(exchange)
        return answer

    def _run(self, exchange: Exchange[_T]) -> Generator[_T, None, None]:
        heartbeat = Heartbeat(self.url, self.model, self._deaths)
        done = threading.Event()

        def requests() -> Iterator[Any]:
            # On a thread of gRPC's, until the stream may end.
            yield exchange.request
            while not done.wait(TICK_SECONDS):
                ping = heartbeat.beat()
                if heartbeat.error is not None:
                    call.cancel()
                    return
                if ping is not None:
                    yield ping

        call = self._stub.ModelStreamInfer(
            requests(), timeout=self.timeout, metadata=exchange.metadata
        )
        try:
            for message in call:
                if heartbeat.read(message):
                    continue
                heartbeat.pause()
                yield from exchange.read(message)
                heartbeat.resume()
                if exchange.is_over:
                    done.set()
            exchange.check_ended()
        except grpc.RpcError as error:
            raise heartbeat.error or exchange.explain(error, self.tls) from error
        finally:
            done.set()
            call.cancel()


class AsyncClient:
    """`Client` for asyncio; used inside one event loop."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = DEFAULT_MODEL,
        timeout: float | None = None,
        tls: TLS | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout
        self.tls = tls
        self._connection = _Connection(url, tls)
        self._deaths = Deaths()

    def for_model(self, model: str) -> AsyncClient:
        """A client of another model of the server, on the same connection."""
        other = copy(self)
        other.model, other._deaths = model, Deaths()
        return other

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer to `prompt`; raises as `Client.generate` does."""
        start = time.monotonic()
        exchange = ask_for_text(self.url, self.model, prompt, False, options)
        chunks = [chunk async for chunk in self._run(exchange)]
        return Completion.of(chunks, time.monotonic() - start)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; raises as `Client.stream` does."""
        return self._run(ask_for_text(self.url, self.model, prompt, True, options))

    async def describe(self) -> Description:
        """What the model is; raises as `Client.describe` does."""
        return await self._only(describe(self.url, self.model))

    async def tokenize(self, prompt: Prompt, **options: Unpack[TokensOptions]) -> Tokens:
        """The tokens that `prompt` is to the model; raises as `Client.tokenize` does."""
        return await self._only(tokenize(self.url, self.model, prompt, options))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens; raises as `Client.detokenize` does."""
        return await self._only(detokenize(self.url, self.model, token_ids))

    async def is_ready(self) -> bool:
        """Whether the server answers, its model's process lives, and takes requests."""
        stub = self._connection.stub
        request = service_pb2.ModelReadyRequest(name=self.model)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                if not (await stub.ModelReady(request)).ready:
                    return False
                # Triton says yes of a model whose process is dead.
                call = stub.ModelStreamInfer(iter([make_ping(self.model, "ping")]))
                answers = [says_ready(message) async for message in call]
                return bool(answers) and all(answers)
        except (grpc.RpcError, TimeoutError):
            return False

    async def models(self) -> list[str]:
        """The names of the server's Tandem models that are loaded; raises as `Client.models`."""
        stub = self._connection.stub
        try:
            index = await stub.RepositoryIndex(INDEX, timeout=_READY_SECONDS)
            return [
                name
                for name in ready_models(index)
                if is_tandem(await stub.ModelConfig(config_request(name), timeout=_READY_SECONDS))
            ]
        except grpc.RpcError as error:
            why = await asyncio.to_thread(explain, error, self.url, self.tls)
            raise untold(why) from error

    async def close(self) -> None:
        """Closes the connection, of all its models; running requests are cancelled."""
        await self._connection.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _only(self, exchange: Exchange[_T]) -> _T:
        (answer,) = [answer async for answer in self._run(exchange)]
        return answer

    async def _run(self, exchange: Exchange[_T]) -> AsyncGenerator[_T, None]:
        heartbeat = Heartbeat(self.url, self.model, self._deaths)
        done = asyncio.Event()

        async def requests() -> AsyncIterator[Any]:
            yield exchange.request
            while not await _wait(done, TICK_SECONDS):
                ping = heartbeat.beat()
                if heartbeat.error is not None:
                    call.cancel()
                    return
                if ping is not None:
                    yield ping

        call = self._connection.stub.ModelStreamInfer(
            requests(), timeout=self.timeout, metadata=exchange.metadata
        )
        try:
            async for message in call:
                if heartbeat.read(message):
                    continue
                heartbeat.pause()
                for chunk in exchange.read(message):
                    yield chunk
                heartbeat.resume()
                if exchange.is_over:
                    done.set()
            exchange.check_ended()
        except grpc.RpcError as error:
            if heartbeat.error is not None:
                raise heartbeat.error from error
            raise await asyncio.to_thread(exchange.explain, error, self.tls) from error
        except asyncio.CancelledError:
            # So gRPC reports a call that was cancelled here.
            if heartbeat.error is not None:
                raise heartbeat.error from None
            raise
        finally:
            done.set()
            call.cancel()


class _Connection:
    """Made at the first request: it belongs to the event loop that runs then."""

    def __init__(self, url: str, tls: TLS | None) -> None:
        self._url = url
        self._tls = tls

    @cached_property
    def channel(self) -> Any:
        if self._tls is None:
            return grpc.aio.insecure_channel(self._url)
        return grpc.aio.secure_channel(self._url, self._tls.credentials())

    @cached_property
    def stub(self) -> Any:
        return service_pb2_grpc.GRPCInferenceServiceStub(self.channel)


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came in time."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
