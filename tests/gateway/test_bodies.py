"""What is in a body: how much of it there may be, and that nothing of it is repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from gateway_setup import (
    KEY,
    FakeTriton,
    ask,
    connect,
    error_of,
    fake_triton,
    gateway,
    head,
    metric,
    post,
    read_answer,
    wait_until,
)
from tandem_gateway.parsing import read_json
from tandem_gateway.schema import ChatCompletionRequest

MIB = 2**20


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(
        upstream.url, KEY, max_bodies_bytes=3 * MIB, max_prompts=10, max_streams=12
    ) as url:
        yield url


def test_bodies_share_a_memory(url: str) -> None:
    """Small ones are always taken; what was held is given back."""
    with connect(url) as one, connect(url) as two:
        for connection in (one, two):
            connection.sendall(head(f"Content-Length: {2 * MIB}"))
        one.sendall(b" " * (2 * MIB - 1))
        wait_until(lambda: metric(url, "body_bytes") == 2 * MIB - 1)
        two.sendall(b" " * (MIB + 100_000))
        answer = read_answer(two)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        assert b"bodies_full" in answer
        assert ask(url).status_code == 200
        one.sendall(b" ")
        assert read_answer(one).startswith(b"HTTP/1.1 400 ")
    wait_until(lambda: metric(url, "body_bytes") == 0)
    assert ask(url, prompt="x" * 2 * MIB).status_code == 200


@pytest.mark.parametrize("path", ["/ping", "/nothing"])
def test_what_is_no_request_has_no_body(url: str, path: str) -> None:
    """Nobody is asked for a key there, so nothing is read or unpacked either."""
    with connect(url) as connection:
        lines = (f"Content-Length: {2 * MIB}", "Content-Encoding: gzip")
        connection.sendall(head(*lines, path=path) + b" " * MIB)
        assert read_answer(connection).split(b" ")[1] in (b"200", b"404")
        assert metric(url, "body_bytes") == 0


def test_prompts_of_one_request_are_limited(url: str) -> None:
    assert ask(url, ["a"] * 10).status_code == 200
    answer = ask(url, ["a"] * 11)
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "prompt: at most 10 in one request, got 11"


def test_streams_are_limited(upstream: FakeTriton, url: str) -> None:
    with connect(url) as connection:
        body = json.dumps({"model": "tandem", "prompt": ["..."] * 10, "stream": True}).encode()
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        wait_until(lambda: metric(url, "streams") == 10)
        assert ask(url, ["a"] * 2).status_code == 200
        answer = ask(url, ["a"] * 3)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert error_of(answer)["code"] == "streams"
    wait_until(lambda: metric(url, "streams") == 0)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "the body is not JSON: EOF"),
        ("[" * 1_000_000, 413, "the body holds more than 262144 values"),
        ("[" * 10_000, 400, "the body is not JSON: recursion limit"),
        ('{"a":' * 10_000, 400, "the body is not JSON: recursion limit"),
        ('{"model": "tandem", "prompt": "\\ud800"}', 400, "the body is not JSON"),
        ('{"model": "tandem", "prompt": "x", "stop": ["\\udfff"]}', 400, "the body is not JSON"),
        (b'{"model": "tandem", "prompt": "\xff"}', 400, "the body is not JSON: invalid unicode"),
        ('{"model": "tandem", "prompt": "x", "top_p": NaN}', 400, "the body is not JSON"),
        ("[" + "[]," * 300_000 + "[]]", 413, "the body holds more than 262144 values"),
        (json.dumps({str(n): n for n in range(300)}), 400, "the body has more than 200 parameters"),
        (json.dumps({"x" * 100_000: 1}), 400, "model: Field required"),
        ("7", 400, "the body: Input should be"),
        ("", 400, "the body: Field required"),
    ],
)
def test_a_body_that_is_wrong(url: str, body: str | bytes, status: int, message: str) -> None:
    answer = post(url, body)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["message"].startswith(message)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("completions", {"prompt": [[]]}, "prompt must hold at least one token, got []"),
        ("completions", {"prompt": ""}, "prompt must hold at least one token, got ''"),
        ("completions", {"prompt": []}, "prompt must hold at least one text or token, got []"),
        ("completions", {"prompt": [99999999999]}, "0 to 2147483647, got 99999999999"),
        ("completions", {"prompt": [[7], [-1]]}, "token ids from 0 to 2147483647, got -1"),
        ("chat/completions", {"messages": []}, "messages must hold at least one message, got []"),
    ],
)
def test_what_is_no_prompt(url: str, path: str, more: dict[str, Any], message: str) -> None:
    answer = post(url, json.dumps({"model": "tandem", **more}), path=path)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]
    assert error_of(answer)["param"] == next(iter(more))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_no_tokens_at_all_are_not_as_many_as_there_is_room_for(field: str) -> None:
    """The server refuses 0 by name."""
    body = {"model": "tandem", "messages": [{"role": "user", "content": "x"}]}
    limits = [
        ChatCompletionRequest.model_validate({**body, field: limit}).options()["max_tokens"]
        for limit in (0, 7, None)
    ]
    assert limits == [0, 7, 2**31 - 1]


LONG = "ä" * 100_000


@pytest.mark.parametrize(
    "more",
    [
        {"model": LONG},
        {"prompt": {LONG: LONG}},
        {"prompt": [[LONG]]},
        {"temperature": LONG},
        {"stop": [1] * 100_000},
        {"response_format": {"type": LONG}},
        {"logit_bias": {LONG: LONG}},
        {"logit_bias": {str(number): 1 for number in range(5000)}},
        {"logit_bias": dict.fromkeys(map(str, range(20_000)), LONG[:20])},
    ],
)
def test_an_error_repeats_but_a_piece_of_what_was_sent(url: str, more: dict[str, Any]) -> None:
    started = time.monotonic()
    answer = post(url, json.dumps({"model": "tandem", "prompt": "x", **more}))
    assert answer.status_code in (400, 404)
    assert len(answer.text) < 1000
    assert time.monotonic() - started < 5


def test_a_header_repeats_but_a_piece_of_what_was_sent(url: str) -> None:
    answer = post(url, json.dumps({"model": "tandem", "prompt": "x", LONG: 1, "messages": LONG}))
    assert answer.status_code == 200
    assert len(answer.headers["x-tandem-ignored"]) < 500


def test_an_error_of_the_server_is_cut(upstream: FakeTriton, url: str) -> None:
    """And has no lines of source."""
    for refusal, status in (("INVALID_ARG: unknown drafter " + LONG, 400), (LONG, 400)):
        upstream.refusal = refusal
        answer = ask(url)
        assert answer.status_code == status
        assert len(answer.text) < 4000  # 500 characters, escaped
    upstream.refusal = "INTERNAL: bad\n\nAt:\n  /opt/tandem/model.py(123): execute"
    answer = ask(url)
    upstream.refusal = ""
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "bad"


def test_values_are_counted_outside_of_texts() -> None:
    text = json.dumps({"prompt": '\\", [1, 2], "' * 100_000})
    assert read_json(text.encode(), 10) == json.loads(text)
    with pytest.raises(HTTPException, match="more than 10 values"):
        read_json(b'["a", "b,[", ' + b"1," * 10 + b"2]", 10)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"' + b"a, b " * (8 * MIB // 5) + b'"}',
        b'{"a":"' + b'\\"' * (4 * MIB) + b'"}',
        b'{"a":"' + b"\\u00e9" * (8 * MIB // 6) + b'"}',
        b"[" + b"[]," * (8 * MIB // 3) + b"[]]",
        b"[" + b'"",' * (8 * MIB // 3) + b'""]',
        b"{" + b",".join(b'"%d":1' % number for number in range(MIB // 2)) + b"}",
        b"[" * 8 * MIB,
        b'["' + b"x" * 8 * MIB,
    ],
)
def test_no_body_takes_long_to_read(body: bytes) -> None:
    """Nobody else is served meanwhile.

    Some 0.1 to 0.3 s of the processor's time here, and up to 1.4 s for Python's own parser.
    """
    started = time.process_time()
    with suppress(HTTPException, json.JSONDecodeError):
        read_json(body, 2**18)
    assert time.process_time() - started < 1.0
