"""The HTTP application: routes, keys, limits, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tandem_client import AsyncClient, Chunk, Options, Prompt, TandemClientError
from tandem_gateway.errors import APIError
from tandem_gateway.log import log_request, logger
from tandem_gateway.responses import Kind, Usage, Writer
from tandem_gateway.schema import ChatCompletionRequest, CompletionRequest, Request

MAX_BODY_BYTES = 8 * 2**20
_POLL_SECONDS = 0.1
# W3C's header: version, trace, parent and flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_PAGE = Path(__file__).with_name("chat.html")

# (choice, chunk), as they come.
Chunks = AsyncIterator[tuple[int, Chunk]]


def create_app(
    url: str,
    model: str,
    *,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application.

    Args:
        url: gRPC address of the Triton server.
        model: the model's name there, and the only one that clients may ask for.
        api_keys: one of them must come with each request to `/v1`; nobody is asked when empty.
        max_body_bytes: larger requests are refused.
    """
    client = AsyncClient(url, model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.close()

    app = FastAPI(title="Tandem", lifespan=lifespan)
    gateway = _Gateway(client, model, api_keys)
    guarded: dict[str, Any] = {"dependencies": [Depends(gateway.check_key)]}
    app.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"], **guarded)
    app.add_api_route("/v1/completions", gateway.complete, methods=["POST"], **guarded)
    app.add_api_route("/v1/models", gateway.models, methods=["GET"], **guarded)
    app.add_api_route("/v1/models/{name:path}", gateway.model_card, methods=["GET"], **guarded)
    app.add_api_route("/health", gateway.health, methods=["GET"])
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_middleware(_BodyLimit, limit=max_body_bytes)
    app.add_exception_handler(APIError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    return app


async def page() -> FileResponse:
    """The chat page."""
    return FileResponse(_PAGE, media_type="text/html")


class _Gateway:
    """The routes."""

    def __init__(self, client: AsyncClient, model: str, api_keys: Sequence[str]) -> None:
        self._client = client
        self._model = model
        self._keys = [key.encode() for key in api_keys]
        self._started_at = int(time.time())

    async def check_key(self, request: HTTPRequest) -> None:
        """Refuses requests without one of the keys, in a time that doesn't depend on them."""
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise APIError(
                401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )

    async def chat(self, request: ChatCompletionRequest, http: HTTPRequest) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answer("chat.completion", request, http)

    async def complete(self, request: CompletionRequest, http: HTTPRequest) -> Response:
        """`POST /v1/completions`."""
        return await self._answer("text_completion", request, http)

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self._card()]}

    async def model_card(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/NAME`."""
        self._check_model(name)
        return self._card()

    async def health(self) -> Response:
        """`GET /health`: 200 when the server and the model take requests, else 503."""
        ready = await self._client.is_ready()
        return JSONResponse({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._started_at,
            "owned_by": "tandem",
        }

    def _check_model(self, name: str) -> None:
        if name != self._model:
            message = f"the model {name!r} does not exist; this server has {self._model!r}"
            raise APIError(404, message, "model_not_found", "model")

    async def _answer(self, kind: Kind, request: Request, http: HTTPRequest) -> Response:
        self._check_model(request.model)
        try:
            options, prompts = request.options(), request.prompts
        except ValueError as error:
            raise APIError(400, str(error), "invalid_value") from error
        writer = Writer(kind, self._model, options.get("logprobs"))
        options["request_id"] = writer.id
        traceparent = http.headers.get("traceparent", "")
        options["traceparent"] = traceparent if _TRACEPARENT.fullmatch(traceparent) else ""
        chunks = self._generate(prompts, options, request.n)
        if request.stream:
            with_usage = request.stream_options is not None and request.stream_options.include_usage
            # The first chunk decides on the status.
            first = await _unless_gone(anext(chunks), http)
            events = _events(writer, first, chunks, request.n, with_usage)
            headers = {"x-request-id": writer.id}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        answers, usage = await _unless_gone(_collect(chunks, request.n), http)
        return JSONResponse(writer.whole(answers, usage), headers={"x-request-id": writer.id})

    async def _generate(self, prompts: Sequence[Prompt], options: Options, n: int) -> Chunks:
        """All prompts at once; choice `n * i + j` is sequence j of prompt i."""
        if n > 1:
            options["n"] = n
        queue: asyncio.Queue[tuple[int, Chunk] | APIError | None] = asyncio.Queue()

        async def follow(number: int, prompt: Prompt) -> None:
            try:
                async with aclosing(self._client.stream(prompt, **options)) as stream:
                    async for chunk in stream:
                        await queue.put((number * n + chunk.index, chunk))
                await queue.put(None)
            except TandemClientError as error:
                await queue.put(APIError.of(error))
            except Exception as error:  # shown to this client, and the others go on
                logger.exception("a request failed")
                await queue.put(APIError(500, f"internal error: {error!r}"))

        started, outcome = time.monotonic(), "cancelled"
        tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(prompts)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, APIError):
                    outcome = f"error {item.status}: {item}"
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
            outcome = "done"
        finally:
            seconds = time.monotonic() - started
            log_request(options["request_id"], options["traceparent"], outcome, seconds)
            # Cancels the requests that still run, on the server too.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(chunks: Chunks, n: int) -> tuple[dict[int, list[Chunk]], Usage]:
    answers: dict[int, list[Chunk]] = defaultdict(list)
    usage = Usage()
    async with aclosing(chunks):  # type: ignore[type-var]
        async for index, chunk in chunks:
            answers[index].append(chunk)
            usage.add(index // n, chunk)
    return answers, usage


async def _events(
    writer: Writer, first: tuple[int, Chunk], chunks: Chunks, n: int, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; closed early, it cancels the request on the server."""
    usage = Usage()
    async with aclosing(chunks):  # type: ignore[type-var]
        try:
            usage.add(first[0] // n, first[1])
            yield _event(writer.chunk(*first))
            async for index, chunk in chunks:
                usage.add(index // n, chunk)
                yield _event(writer.chunk(index, chunk))
        except APIError as error:
            yield _event(error.to_json())
            return
    if with_usage:
        yield _event(writer.usage(usage))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(work: Awaitable[Any], http: HTTPRequest) -> Any:
    """The result of `work`, which is cancelled when the client closes its connection."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=_POLL_SECONDS))[0]:
            if await http.is_disconnected():
                raise APIError(499, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()


class _BodyLimit:
    """Refuses bodies that are too large, whether or not they say so in advance."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                error = APIError(413, f"the body is larger than {self._limit} bytes", "too_large")
                await JSONResponse(error.to_json(), 413)(scope, receive, send)
                return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


async def _answer_error(_: HTTPRequest, error: Exception) -> JSONResponse:
    """Every error in OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"] if part != "body")
        given = repr(problem.get("input"))[:80]
        message = f"{place or 'the body'}: {problem['msg']}, got {given}"
        error = APIError(400, message, "invalid_value", place or None)
    elif isinstance(error, HTTPException):
        error = APIError(error.status_code, str(error.detail))
    assert isinstance(error, APIError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.to_json(), error.status, headers)
