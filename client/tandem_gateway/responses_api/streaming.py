"""A response as typed server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from tandem_client import Chunk
from tandem_gateway.errors import APIError
from tandem_gateway.generation import Chunks
from tandem_gateway.responses import Usage, Writer
from tandem_gateway.responses_api.events import Event, ResponseWriter


async def response_events(
    response: ResponseWriter, writer: Writer, first: tuple[int, Chunk], chunks: Chunks
) -> AsyncIterator[str]:
    """Server-sent events; closed early, it cancels the request on the server."""
    usage = Usage()
    async with aclosing(chunks):  # type: ignore[type-var]
        try:
            for event in response.begin():
                yield _sent(event)
            usage.add(*first)
            for event in response.add(writer.chunk(*first)):
                yield _sent(event)
            async for index, chunk in chunks:
                usage.add(index, chunk)
                for event in response.add(writer.chunk(index, chunk)):
                    yield _sent(event)
        except APIError as error:
            for event in response.fail(error):
                yield _sent(event)
            return
    for event in response.end(usage):
        yield _sent(event)


def _sent(event: Event) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
