"""The gateway before servers that are dead, stopped or draining."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
import requests

from gateway_setup import (
    KEY,
    TIMEOUT,
    FakeTriton,
    ask,
    error_of,
    fake_triton,
    gateway,
    wait_until,
)


@pytest.fixture
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        fake.seconds = 0.02
        yield fake


@pytest.fixture
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url, KEY, stream_idle_seconds=2.0) as url:
        yield url


def status(url: str) -> int:
    return requests.get(f"{url}/health", timeout=TIMEOUT).status_code


@pytest.mark.slow
@pytest.mark.parametrize("state", ["dead", "draining", "stopped"])
def test_health_follows_the_model(upstream: FakeTriton, url: str, state: str) -> None:
    """Triton itself says that it is ready in each of these."""
    assert status(url) == 200
    upstream.state = state
    wait_until(lambda: status(url) == 503, 7)
    upstream.state = "alive"
    wait_until(lambda: status(url) == 200, 7)


def test_many_questions_are_one_for_the_server(upstream: FakeTriton, url: str) -> None:
    before = upstream.num_pings
    for _ in range(50):
        assert status(url) == 200
    assert upstream.num_pings - before < 5


def test_a_request_to_a_dead_model_is_not_to_blame(upstream: FakeTriton, url: str) -> None:
    upstream.state = "dead"
    answer = ask(url)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert "is not healthy" in error_of(answer)["message"]


@pytest.mark.slow
def test_streams_end_within_five_seconds_when_their_model_dies(upstream: FakeTriton) -> None:
    with gateway(upstream.url, KEY) as url:
        results: list[tuple[str, float]] = []

        def follow(stream: bool) -> None:
            answer = ask(url, "...", stream=stream)
            results.append((answer.text, time.monotonic()))

        threads = [threading.Thread(target=follow, args=(number < 6,)) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: upstream.num_running == 8)
        time.sleep(0.2)
        upstream.state, died_at = "dead", time.monotonic()
        for thread in threads:
            thread.join()
    for text, ended_at in results:
        error = json.loads(text.split("data: ")[-1])["error"]
        assert "the model's process is dead" in error["message"]
        assert error["code"] == "server_unavailable"
        assert ended_at - died_at < 5
    assert len(results) == 8


def test_a_stream_has_an_idle_limit(upstream: FakeTriton, url: str) -> None:
    upstream.state = "stopped"
    started = time.monotonic()
    answer = ask(url)
    assert answer.status_code == 504
    assert error_of(answer)["message"] == "nothing came from the model for 2 s"
    assert time.monotonic() - started < 5
    wait_until(lambda: upstream.num_running == 0)
