"""The client library before a model that dies, and before one that only takes its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from gateway_setup import FakeTriton, fake_triton
from tandem_client import AsyncClient, Client, RequestError, ServerUnavailableError
from tandem_client.protocol import make_request, refusal


@pytest.fixture
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


def test_a_blocking_stream_ends_when_its_model_dies(upstream: FakeTriton) -> None:
    upstream.seconds = 0.02
    with Client(upstream.url) as client:
        stream = client.stream("...")
        next(stream)
        upstream.state, died_at = "dead", time.monotonic()
        with pytest.raises(ServerUnavailableError, match="is dead"):
            list(stream)
    assert time.monotonic() - died_at < 5


@pytest.mark.slow
def test_an_asyncio_stream_ends_when_its_model_dies(upstream: FakeTriton) -> None:
    upstream.seconds = 0.02

    async def follow() -> float:
        async with AsyncClient(upstream.url) as client:
            stream = client.stream("...")
            await anext(stream)
            upstream.state, died_at = "dead", time.monotonic()
            with pytest.raises(ServerUnavailableError, match="is dead"):
                [chunk async for chunk in stream]
        return time.monotonic() - died_at

    assert asyncio.run(follow()) < 5


@pytest.mark.slow
def test_a_slow_answer_is_waited_for(upstream: FakeTriton) -> None:
    """What the pings bring is not part of it."""
    upstream.seconds = 2.6
    with Client(upstream.url) as client:
        assert client.generate("a b").text == "ab"
    assert 1 <= upstream.num_pings <= 4


@pytest.mark.slow
def test_a_slow_reader_doesn_t_take_its_model_for_dead(upstream: FakeTriton) -> None:
    with Client(upstream.url) as client:
        texts = []
        for chunk in client.stream("a b c"):
            texts.append(chunk.text)
            time.sleep(1.5)
    assert texts == ["a", "b", "c"]


def test_a_quick_answer_needs_no_ping(upstream: FakeTriton) -> None:
    with Client(upstream.url) as client:
        for _ in range(20):
            assert client.generate("a b c").text == "abc"
    assert upstream.num_pings == 0


@pytest.mark.parametrize("options", [{"stop": ["\ud800"]}, {"drafter": "\udfff"}])
def test_half_a_surrogate_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="sampling_parameters is not valid UTF-8"):
        make_request("m", "x", stream=True, options=options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="the prompt is not valid UTF-8"):
        make_request("m", [{"content": "\ud800"}], stream=True, options={})


def test_a_dead_process_is_not_the_requests_fault() -> None:
    assert refusal("Stub process 'tandem_0_0' is not healthy.").code == "UNAVAILABLE"
