"""What a request's headers decide: keys, framing, rates; and what every answer's headers say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
import requests

from gateway_setup import (
    KEY,
    TIMEOUT,
    FakeTriton,
    ask,
    connect,
    error_of,
    fake_triton,
    gateway,
    head,
    metric,
    read_answer,
    read_to_end,
)
from tandem_gateway import create_app
from tandem_gateway.auth import Keys, read_keys
from tandem_gateway.cli import main
from tandem_gateway.errors import APIError
from tandem_gateway.limits import Limits
from tandem_gateway.rates import Rates


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url, KEY, "other", max_body_bytes=100_000) as url:
        yield url


def first_answer(url: str, request: bytes) -> bytes:
    """What comes back before anything else is sent."""
    with connect(url) as connection:
        connection.sendall(request)
        connection.settimeout(3)
        return read_answer(connection)


@pytest.mark.parametrize("key", ["wrong", "", f"{KEY}x"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_key_is_checked_before_the_body_is_there(url: str, path: str, key: str) -> None:
    answer = first_answer(url, head("Content-Length: 1000", path=path, key=key))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"invalid_api_key" in answer
    assert b"www-authenticate: Bearer" in answer


def test_a_length_is_checked_before_the_body_is_there(url: str) -> None:
    answer = first_answer(url, head("Content-Length: 100001"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 100000 bytes" in answer


def test_a_body_without_a_length_is_limited(url: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 30_000] * 5

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = requests.post(f"{url}/v1/completions", data=pieces(), headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 413
    body = json.dumps({"model": "tandem", "prompt": "a b"}).encode()
    answer = requests.post(
        f"{url}/v1/completions", data=iter([body[:9], body[9:]]), headers=headers, timeout=TIMEOUT
    )
    assert answer.json()["choices"][0]["text"] == "ab"


def test_a_refused_client_can_send_all_and_read_why(url: str) -> None:
    """The connection isn't reset under its hands, and serves the next request."""
    with requests.Session() as session:
        for _ in range(2):
            answer = session.post(f"{url}/v1/completions", data=b"x" * 5_000_000, timeout=TIMEOUT)
            assert answer.status_code == 401
        answer = session.get(f"{url}/health", timeout=TIMEOUT)
        assert answer.status_code == 200


def test_two_lengths_are_refused(url: str) -> None:
    body = json.dumps({"model": "tandem", "prompt": "a"})
    for lines in (
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Transfer-Encoding: identity, chunked",),
    ):
        with connect(url) as connection:
            chunk = f"{len(body):x}\r\n{body}\r\n0\r\n\r\n"
            connection.sendall(head(*lines) + chunk.encode())
            answer, seconds = read_to_end(connection)
        assert re.match(b"HTTP/1.1 (400|501) ", answer), (lines, answer)
        assert answer.count(b"HTTP/1.1") == 1
        assert seconds < 3  # and the connection is closed


def test_rates_fill_steadily() -> None:
    now = 0.0
    rates = Rates(Limits(requests_per_minute=60, tokens_per_minute=600), clock=lambda: now)
    for _ in range(60):
        rates.admit("a")
    with pytest.raises(APIError, match="60 requests a minute") as refusal:
        rates.admit("a")
    assert refusal.value.headers["Retry-After"] == "1"
    rates.admit("b")
    now = 2.0
    rates.admit("a")
    rates.charge("b", 900)  # an answer may be longer than what was left
    with pytest.raises(APIError, match="600 tokens a minute") as refusal:
        rates.admit("b")
    assert refusal.value.headers["Retry-After"] == "31"
    now = 34.0
    rates.admit("b")


@pytest.mark.parametrize(
    ("limits", "num_served", "code"),
    [
        ({"requests_per_minute": 3}, 3, "requests_rate_limit"),
        # Five that are read and three that are written, each time.
        ({"tokens_per_minute": 12}, 2, "tokens_rate_limit"),
    ],
)
def test_a_key_has_a_rate(
    upstream: FakeTriton, limits: dict[str, int], num_served: int, code: str
) -> None:
    with gateway(upstream.url, KEY, "other", **limits) as url:
        for _ in range(num_served):
            assert ask(url).status_code == 200
        answer = ask(url)
        assert answer.status_code == 429
        assert error_of(answer)["code"] == code
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert ask(url, key="other").status_code == 200
        assert metric(url, f'refused_total{{reason="{code}"}}') == 1
        (name,) = [Keys([KEY]).find(f"Bearer {KEY}".encode())]
        assert metric(url, f'requests_total{{key="{name}",status="200"}}') == num_served
        assert metric(url, f'tokens_total{{key="{name}",kind="output"}}') == 3 * num_served
        assert metric(url, f'tokens_total{{key="{name}",kind="prompt"}}') == 5 * num_served


def test_metrics_need_a_key_and_show_none(url: str) -> None:
    assert requests.get(f"{url}/metrics", timeout=TIMEOUT).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    page = requests.get(f"{url}/metrics", headers=headers, timeout=TIMEOUT).text
    assert "tandem_gateway_connections" in page
    assert KEY not in page


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_no_page_loads_foreign_scripts(url: str, path: str) -> None:
    assert requests.get(f"{url}{path}", timeout=TIMEOUT).status_code == 404


def test_the_schema_can_be_had_in_python() -> None:
    schema = create_app("127.0.0.1:9").openapi()
    content = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"] == {
        "$ref": "#/components/schemas/CompletionRequest"
    }


def test_answers_tell_browsers_what_to_refuse(url: str) -> None:
    session = requests.Session()
    for path in ("/", "/health", "/v1/models", "/nowhere"):
        headers = session.get(f"{url}{path}", timeout=TIMEOUT).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "unsafe-inline" not in headers["Content-Security-Policy"]
        assert "Server" not in headers
    session.close()


def test_the_page_may_run_its_own_script_and_no_other(url: str) -> None:
    answer = requests.get(url, timeout=TIMEOUT)
    policy = answer.headers["Content-Security-Policy"]
    assert len(re.findall("'sha256-[^']+'", policy)) == 2
    assert "connect-src 'self'" in policy
    assert len(re.findall("<script", answer.text)) == len(re.findall("<style", answer.text)) == 1


@pytest.mark.parametrize("keys", [",", "", " , "])
def test_a_variable_without_a_key_is_an_error(
    keys: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_API_KEYS", keys)
    with pytest.raises(SystemExit) as exit_:
        main(["--port", "1"])
    assert exit_.value.code == 2
    assert "TANDEM_API_KEYS names no key" in capsys.readouterr().err


def test_keys_are_read_without_spaces() -> None:
    assert read_keys({}) == []
    assert read_keys({"TANDEM_API_KEYS": "a, b,"}) == ["a", "b"]


@pytest.mark.parametrize("option", ["--max-streams", "--header-seconds", "--tokens-per-minute"])
def test_a_wrong_limit_is_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([option, "-1"])
    assert exit_.value.code == 2
    assert option[2:].replace("-", "_") in capsys.readouterr().err


def test_a_client_that_waits_to_be_told_is_told(url: str) -> None:
    """`Expect: 100-continue`, as curl sends it with large bodies."""
    body = json.dumps({"model": "tandem", "prompt": "a"}).encode()
    started = time.monotonic()
    with connect(url) as connection:
        connection.sendall(head(f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert read_answer(connection).startswith(b"HTTP/1.1 200 ")
    assert time.monotonic() - started < 3
