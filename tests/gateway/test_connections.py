"""Clients that keep the gateway waiting, and too many of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import requests

from gateway_setup import (
    KEY,
    TIMEOUT,
    FakeTriton,
    ask,
    connect,
    fake_triton,
    gateway,
    head,
    metric,
    read_answer,
    read_to_end,
    wait_until,
)


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(
        upstream.url,
        KEY,
        header_seconds=0.5,
        body_seconds=1.0,
        idle_seconds=1.5,
        write_seconds=1.0,
        max_connections=12,
        max_connections_per_address=8,
    ) as url:
        yield url


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_headers_have_a_time(url: str, sent: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(sent)
        answer, seconds = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "header_timeout"
    assert 0.3 < seconds < 3


def test_a_dribble_of_headers_has_no_more_time(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        connection.settimeout(0.1)
        answer = b""
        for _ in range(40):
            try:
                connection.sendall(b"a: b\r\n")
                answer = connection.recv(1000)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_second_request_of_a_connection_has_a_time_too(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        answer, seconds = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.3 < seconds < 3


def test_a_body_has_a_time(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(head("Content-Length: 100") + b"{")
        answer, seconds = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer
    assert 0.8 < seconds < 5


def test_an_idle_connection_is_closed(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer, seconds = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert 1.2 < seconds < 5


def test_connections_from_one_address_are_limited(url: str) -> None:
    """Others are served; 127.0.0.2 is an address of this machine as well."""
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(url)).sendall(b"GET /")
        with connect(url) as late:
            answer, _ = read_to_end(late)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 1\r\n" in answer
        assert b"address_connections" in answer
        host, port = url.removeprefix("http://").split(":")
        for number in range(5):
            other = socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0))
            stack.enter_context(other)
            other.settimeout(TIMEOUT)
            other.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = read_answer(other)
            assert answer.startswith(b"HTTP/1.1 200 " if number < 4 else b"HTTP/1.1 503 ")
    assert b"Retry-After: 1\r\n" in answer
    wait_until(lambda: metric(url, "connections ") == 1)  # that of the question itself


def test_a_client_that_takes_nothing_is_let_go(upstream: FakeTriton, url: str) -> None:
    """And its request ends on the server."""
    body = json.dumps({"model": "tandem", "prompt": "...", "stream": True}).encode()
    with connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        wait_until(lambda: upstream.num_running == 1)
        wait_until(lambda: upstream.num_running == 0)
    wait_until(lambda: metric(url, "connections ") == 1)


def test_tiny_pieces_are_refused(url: str) -> None:
    """Each costs the parser as much as a large one."""
    with connect(url) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        answer = b""
        try:
            connection.sendall(b"1\r\nx\r\n" * 100_000)
        except ConnectionError:
            pass
        else:
            answer, _ = read_to_end(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert requests.get(f"{url}/health", timeout=1).status_code == 200


def test_what_is_no_http_harms_nobody(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """After an answer as well, in the body that was not read."""
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 100,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 10_000,
        head("Transfer-Encoding: chunked", key="wrong") + b"zz\r\n" * 10,
        head("Content-Length: -1"),
        head("Content-Length: 99999999999999999999999"),
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with connect(url) as connection:
            try:
                connection.sendall(sent)
                answer, _ = read_to_end(connection)
            except ConnectionError:
                answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), (sent[:50], answer[:200])
    assert ask(url).json()["choices"][0]["text"] == "abc"
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
