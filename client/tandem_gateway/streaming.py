"""Answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from tandem_client import Chunk
from tandem_gateway.errors import APIError
from tandem_gateway.generation import Chunks
from tandem_gateway.responses import Usage, Writer
from tandem_gateway.schema import StreamOptions


async def events(
    writer: Writer, first: tuple[int, Chunk], chunks: Chunks, n: int, options: StreamOptions
) -> AsyncIterator[str]:
    """Server-sent events; closed early, it cancels the request on the server."""
    usage = Usage()

    def event(index: int, chunk: Chunk) -> str:
        usage.add(index // n, chunk)
        value = writer.chunk(index, chunk)
        if options.include_usage:
            value["usage"] = usage.counts() if options.continuous_usage_stats else None
        return _event(value)

    async with aclosing(chunks):  # type: ignore[type-var]
        try:
            yield event(*first)
            async for index, chunk in chunks:
                yield event(index, chunk)
        except APIError as error:
            yield _event(error.to_json())
            return
    if options.include_usage:
        yield _event(writer.usage(usage))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
