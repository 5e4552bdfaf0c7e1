"""What clients send to the gateway, noted on its way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


class Recorder:
    """Stands before the gateway, and notes what comes."""

    def __init__(self, gateway: str, seconds: float) -> None:
        self.requests: list[dict[str, Any]] = []
        self._gateway = gateway
        self._client = httpx.AsyncClient(base_url=gateway, timeout=seconds)
        route = Route("/{path:path}", self._pass_on, methods=["GET", "POST", "HEAD", "OPTIONS"])
        self.app = Starlette(routes=[route])

    async def _pass_on(self, request: Request) -> StreamingResponse:
        body = await request.body()
        noted: dict[str, Any] = {"method": request.method, "path": request.url.path}
        if body:
            noted["body"] = json.loads(body)
        if _shape(noted) not in map(_shape, self.requests):
            self.requests.append(noted)
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length")}
        sent = self._client.build_request(
            request.method,
            request.url.path,
            params=request.query_params,
            content=body,
            headers=headers,
        )
        answer = await self._client.send(sent, stream=True)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        kept = {k: v for k, v in answer.headers.items() if k != "transfer-encoding"}
        return StreamingResponse(pieces(), answer.status_code, kept)

    def write(self, path: Path) -> None:
        """Writes what has come, one request a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in self.requests)
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _shape(value: Any) -> Any:
    """The same for requests that differ in their texts and numbers alone."""
    if isinstance(value, dict):
        kept = {name: value[name] for name in ("method", "path", "role", "type") if name in value}
        return {name: _shape(each) for name, each in value.items()} | kept
    if isinstance(value, list):
        shapes = [_shape(each) for each in value]
        # However many of a kind follow one another.
        return [shape for shape, _ in groupby(shapes)]
    return value if value is None or isinstance(value, bool) else type(value).__name__
