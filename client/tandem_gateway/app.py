"""The HTTP application: its routes, and the doors before them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, cast
from urllib.parse import quote

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tandem_client import TLS, AsyncClient, Options, TandemClientError
from tandem_client.version import VERSION
from tandem_gateway.auth import Keys
from tandem_gateway.bodies import Bodies
from tandem_gateway.errors import APIError, no_route
from tandem_gateway.generation import Chunks, Generator, Payer, collect
from tandem_gateway.guard import KEY, OWNER, Guard
from tandem_gateway.health import Health
from tandem_gateway.limits import Limits
from tandem_gateway.log import logger
from tandem_gateway.metrics import Metrics
from tandem_gateway.models import Models
from tandem_gateway.parsing import json_route
from tandem_gateway.rates import Rates
from tandem_gateway.responses import Kind, Writer
from tandem_gateway.responses_api.events import ResponseWriter
from tandem_gateway.responses_api.request import ResponsesRequest
from tandem_gateway.responses_api.streaming import response_events
from tandem_gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    Request,
    StreamOptions,
)
from tandem_gateway.security import PAGE, PAGE_POLICY, SecurityHeaders
from tandem_gateway.streaming import events
from tandem_gateway.tokenization import Tokenization
from tandem_gateway.tools.messages import for_template
from tandem_gateway.tools.plan import Parsers, Plan, plan_of
from tandem_options import OptionError, UnknownNames

_POLL_SECONDS = 0.1
# Of fields that nobody knows, as many are named in a header, and no longer.
_MAX_NAMES, _MAX_NAME = 20, 60
_unknown_names = UnknownNames(logger)
# W3C's header: version, trace, parent and flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def create_app(
    url: str,
    models: Sequence[str] = (),
    *,
    tls: TLS | None = None,
    api_keys: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    limits: Limits | None = None,
    strict: bool = False,
    any_model: bool = False,
    parsers: Parsers | None = None,
) -> FastAPI:
    """The application. Limits of connections are `make_server`'s.

    Args:
        url: gRPC address of the Triton server.
        models: names of models there, the only ones that clients may ask for; all models with our
            backend when empty.
        tls: how to speak TLS with the server; None where it listens without.
        api_keys: one of them must come with each request to `/v1` and `/metrics`; nobody is asked
            when empty.
        allowed_origins: whose pages may send requests, besides the gateway's own; `*` for all.
        limits: what is over them is refused.
        strict: whether fields that nobody knows are refused, and not just ignored.
        any_model: whether the one model there is answers to every name.
        parsers: of tool calls and reasoning.
    """
    limits = limits or Limits()
    offered = Models(AsyncClient(url, tls=tls), models, any_name=any_model)
    metrics, rates = Metrics(), Rates(limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await offered.close()

    # The pages of the schema would load scripts from elsewhere.
    app = FastAPI(
        title="Tandem",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        strict_content_type=False,  # the routes see to it
    )
    app.state.metrics, app.state.limits = metrics, limits
    app.router.route_class = json_route(limits.max_json_values)
    gateway = _Gateway(
        offered, metrics, Generator(limits, rates, metrics), strict, parsers or Parsers()
    )
    app.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"])
    app.add_api_route("/v1/completions", gateway.complete, methods=["POST"])
    app.add_api_route("/v1/responses", gateway.respond, methods=["POST"])
    tokenization = Tokenization(offered, limits.stream_idle_seconds)
    app.add_api_route("/tokenize", tokenization.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", tokenization.detokenize, methods=["POST"])
    reading: dict[str, Callable[..., Awaitable[Any]]] = {
        "/v1/models": gateway.models,
        "/v1/models/{name:path}": gateway.model_card,
        "/health": gateway.health,
        "/ping": gateway.health,
        "/version": _version,
        "/metrics": gateway.metrics,
        "/": _page,
    }
    for path, read in reading.items():
        shown = path not in ("/metrics", "/")
        app.add_api_route(path, read, methods=["GET"], include_in_schema=shown)
        app.add_api_route(path, read, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/ping", gateway.health, methods=["POST"])
    # The last one added sees a request first.
    app.add_middleware(Bodies, limits=limits, metrics=metrics)
    app.add_middleware(
        Guard,
        keys=Keys(api_keys),
        rates=rates,
        max_body_bytes=limits.max_body_bytes,
        metrics=metrics,
    )
    if allowed_origins:
        # Before the guard: a browser asks, without a key, whether it may send one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-tandem-ignored", "retry-after"],
        )
    app.add_middleware(SecurityHeaders)
    for kind in (
        APIError,
        OptionError,
        TandemClientError,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, _answer_error)
    return app


async def _version() -> dict[str, str]:
    """`GET /version`."""
    return {"version": VERSION}


async def _page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


async def _answer_error(http: HTTPRequest, error: Exception) -> JSONResponse:
    """Every error in OpenAI's shape."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        return no_route(http.method, http.url.path, error).to_response()
    return (error if isinstance(error, APIError) else APIError.of(error)).to_response()


class _Gateway:
    """The routes."""

    def __init__(
        self,
        models: Models,
        metrics: Metrics,
        generator: Generator,
        strict: bool,
        parsers: Parsers,
    ) -> None:
        self._parsers = parsers
        self._models = models
        self._strict = strict
        self._metrics = metrics
        self._generator = generator
        self._health = Health(models)
        self._started_at = int(time.time())

    async def chat(self, request: ChatCompletionRequest, http: HTTPRequest) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answer("chat.completion", request, http)

    async def complete(self, request: CompletionRequest, http: HTTPRequest) -> Response:
        """`POST /v1/completions`."""
        return await self._answer("text_completion", request, http)

    async def respond(self, request: ResponsesRequest, http: HTTPRequest) -> Response:
        """`POST /v1/responses`."""
        try:
            chat = request.to_chat()
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        writer, chunks, headers = await self._start("chat.completion", chat, http)
        response = ResponseWriter(request)
        if request.stream:
            first = await _unless_gone(anext(chunks), http)
            stream = response_events(response, writer, first, chunks)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        answers, usage = await _unless_gone(collect(chunks, 1), http)
        for chunk in answers[0]:
            list(response.add(writer.chunk(0, chunk)))
        list(response.end(usage))
        return JSONResponse(response.response, headers=headers)

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        names = await self._models.clients()
        return {"object": "list", "data": [await self._card(name) for name in names]}

    async def model_card(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/NAME`."""
        return await self._card((await self._models.find(name)).model)

    async def health(self) -> Response:
        """`GET /health` and `/ping`: 200 when the server and its models take requests, else 503."""
        ready = await self._health.is_ready()
        return JSONResponse({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _card(self, name: str) -> dict[str, Any]:
        """As OpenAI and vLLM have it, and whether there is a chat template."""
        card = {
            "id": name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "tandem",
            "root": name,
            "parent": None,
        }
        # A model that is dead for now is still one of the server's.
        with suppress(TandemClientError):
            description = await self._models.describe(name)
            card["max_model_len"] = description.max_model_len
            card["has_chat_template"] = description.chat_template is not None
        return card

    async def _answer(self, kind: Kind, request: Request, http: HTTPRequest) -> Response:
        writer, chunks, headers = await self._start(kind, request, http)
        if request.stream:
            # The first chunk decides on the status.
            first = await _unless_gone(anext(chunks), http)
            wanted = request.stream_options or StreamOptions()
            stream = events(writer, first, chunks, request.num_answers, wanted)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        answers, usage = await _unless_gone(collect(chunks, request.num_answers), http)
        return JSONResponse(writer.whole(answers, usage), headers=headers)

    async def _start(
        self, kind: Kind, request: Request, http: HTTPRequest
    ) -> tuple[Writer, Chunks, dict[str, str]]:
        """What writes the answer, what comes from the server, and the answer's headers."""
        client = await self._models.find(request.model)
        options, prompts, unknown = request.options(), request.prompts, request.reading.unknown
        plan: Plan | None = None
        ignored: Sequence[str] = ()
        if isinstance(request, ChatCompletionRequest):
            template = (await self._models.describe(request.model)).chat_template or ""
            prompts = [for_template(request.messages, template)]
            plan = plan_of(request, template, self._parsers)
            options |= cast("Options", plan.options if plan else {})
            ignored = plan.ignored if plan else ()
        if self._strict and unknown:
            message = f"{unknown[0]}: there is no such field, and the gateway was told to be strict"
            raise APIError(400, message, "unknown_field", unknown[0])
        _unknown_names.warn(unknown)
        writer = Writer(
            kind,
            client.model,
            options.get("logprobs"),
            num_top_of_prompt=request.reading.values.get("prompt_logprobs"),
            echoes=not options.get("exclude_input_in_output", True),
            request_id=options.get("request_id"),
            with_token_ids=options.get("return_token_ids", False),
            plan=plan,
        )
        options["request_id"] = writer.id
        traceparent = http.headers.get("traceparent", "")
        options["traceparent"] = traceparent if _TRACEPARENT.fullmatch(traceparent) else ""
        payer = Payer(http.scope[KEY], http.scope[OWNER])
        chunks = self._generator.chunks(client, prompts, options, request.num_answers, payer)
        return writer, chunks, {"x-request-id": writer.id} | _ignored([*unknown, *ignored])


def _ignored(names: Sequence[str]) -> dict[str, str]:
    """The header that tells of fields that nobody knows, or that can't be honoured."""
    shown = [quote(name[:_MAX_NAME], safe="") for name in names[:_MAX_NAMES]]
    return {"x-tandem-ignored": ",".join(shown)} if shown else {}


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
