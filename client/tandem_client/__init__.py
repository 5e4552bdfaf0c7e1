"""Client of a Triton server that has the Tandem backend.

>>> from tandem_client import generate, stream
>>> generate("The capital of France is", max_tokens=16).text
>>> for chunk in stream("Once upon a time", max_tokens=64): print(chunk.text, end="")
"""

from collections.abc import Generator
from typing import Unpack

from tandem_client.client import DEFAULT_MODEL, DEFAULT_URL, AsyncClient, Client
from tandem_client.errors import (
    RequestError,
    RequestTimeoutError,
    ServerUnavailableError,
    TandemClientError,
)
from tandem_client.options import Options, Prompt
from tandem_client.protocol import Chunk, Completion
from tandem_client.queries import Description, Tokens
from tandem_client.tls import TLS


def generate(
    prompt: Prompt,
    *,
    url: str = DEFAULT_URL,
    model: str = DEFAULT_MODEL,
    timeout: float | None = None,
    tls: TLS | None = None,
    **options: Unpack[Options],
) -> Completion:
    """The whole answer to one prompt; see `Client.generate`."""
    with Client(url, model, timeout, tls) as client:
        return client.generate(prompt, **options)


def stream(
    prompt: Prompt,
    *,
    url: str = DEFAULT_URL,
    model: str = DEFAULT_MODEL,
    timeout: float | None = None,
    tls: TLS | None = None,
    **options: Unpack[Options],
) -> Generator[Chunk, None, None]:
    """The answer to one prompt as it comes; see `Client.stream`."""
    with Client(url, model, timeout, tls) as client:
        yield from client.stream(prompt, **options)


__all__ = [
    "TLS",
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "Description",
    "Options",
    "Prompt",
    "RequestError",
    "RequestTimeoutError",
    "ServerUnavailableError",
    "TandemClientError",
    "Tokens",
    "generate",
    "stream",
]
