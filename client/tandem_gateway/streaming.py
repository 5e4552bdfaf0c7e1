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


async def events(
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
