"""What users of other servers look for, beside completions."""

from __future__ import annotations

import gzip
import json
import tomllib
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from gateway_setup import (
    KEY,
    TIMEOUT,
    FakeTriton,
    ask,
    error_of,
    fake_triton,
    gateway,
    metric,
    wait_until,
)
from tandem_client.version import VERSION
from tandem_gateway.cli import main

ORIGIN = "https://app.example"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
MOST = 100_000


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url, KEY, origins=[ORIGIN], max_body_bytes=MOST) as url:
        yield url


def send(url: str, path: str, body: Any, **headers: str) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(url + path, data=data, headers=HEADERS | headers, timeout=TIMEOUT)


def test_tokenize_answers_as_vllm_does(url: str) -> None:
    answer = send(url, "/tokenize", {"model": "tandem", "prompt": "ab", "return_token_strs": True})
    assert answer.json() == {
        "count": 2,
        "max_model_len": 2048,
        "tokens": [97, 98],
        "token_strs": ["a", "b"],
    }
    assert send(url, "/tokenize", {"prompt": "ab", "model": None}).json()["count"] == 2
    answer = send(url, "/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 200


def test_detokenize_answers_as_vllm_does(url: str) -> None:
    assert send(url, "/detokenize", {"tokens": [1, 2]}).json() == {"prompt": "text"}
    assert send(url, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "give exactly one of prompt and messages"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "give exactly one of prompt and mess"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0 must have parts of text only",
        ),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "the model 'other' does not exist"),
        ("/detokenize", {"tokens": ["x"]}, 400, "tokens.0: "),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "the model 'other' does not exist"),
    ],
)
def test_what_can_t_be_tokenized_is_refused_by_name(
    url: str, path: str, body: Any, status: int, message: str
) -> None:
    answer = send(url, path, body)
    assert answer.status_code == status
    assert error_of(answer)["message"].startswith(message)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/tokenize/"])
def test_tokens_need_a_key(url: str, path: str) -> None:
    answer = requests.post(url + path, json={"prompt": "a", "tokens": [1]}, timeout=TIMEOUT)
    assert answer.status_code == 401


def test_tokens_count_as_requests(upstream: FakeTriton) -> None:
    with gateway(upstream.url, KEY, requests_per_minute=2) as url:
        statuses = [send(url, "/tokenize", {"prompt": "a"}).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert metric(url, "requests_total") == 3


def test_who_it_is_and_whether_it_lives(url: str) -> None:
    assert requests.get(f"{url}/version", timeout=TIMEOUT).json() == {"version": VERSION}
    for method in ("GET", "POST"):
        assert requests.request(method, f"{url}/ping", timeout=TIMEOUT).status_code == 200


def test_the_version_is_the_project_s() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["version"] == VERSION


def test_a_model_s_card_has_its_length(url: str) -> None:
    card = requests.get(f"{url}/v1/models/tandem", headers=HEADERS, timeout=TIMEOUT).json()
    assert card == {
        "id": "tandem",
        "object": "model",
        "created": card["created"],
        "owned_by": "tandem",
        "root": "tandem",
        "parent": None,
        "max_model_len": 2048,
        "has_chat_template": False,
    }
    models = requests.get(f"{url}/v1/models", headers=HEADERS, timeout=TIMEOUT).json()
    assert models == {"object": "list", "data": [card]}


def test_a_card_needs_no_server() -> None:
    with gateway("127.0.0.1:1", models=["tandem"]) as url:
        (card,) = requests.get(f"{url}/v1/models", timeout=TIMEOUT).json()["data"]
        assert card["id"] == "tandem"
        assert "max_model_len" not in card
        answer = requests.post(f"{url}/tokenize", json={"prompt": "a"}, timeout=TIMEOUT)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "server_unavailable"


PATHS = ["/", "/health", "/ping", "/version", "/metrics", "/v1/models", "/v1/models/tandem"]


@pytest.mark.parametrize("path", PATHS)
def test_head_says_what_get_says_without_a_body(url: str, path: str) -> None:
    asked = requests.get(url + path, headers=HEADERS, timeout=TIMEOUT)
    answer = requests.head(url + path, headers=HEADERS, timeout=TIMEOUT)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == asked.headers["content-type"]


def test_head_needs_a_key_where_get_does(url: str) -> None:
    assert requests.head(f"{url}/v1/models", timeout=TIMEOUT).status_code == 401


def test_metrics_point_to_triton_s(url: str) -> None:
    page = requests.get(f"{url}/metrics", headers=HEADERS, timeout=TIMEOUT).text
    assert "http://HOST:8002/metrics" in page
    names = {family.name for family in text_string_to_metric_families(page)}
    assert "tandem_gateway_requests" in names


def test_browsers_may_send_from_the_pages_that_were_allowed(url: str) -> None:
    asks = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    answer = requests.options(f"{url}/v1/chat/completions", headers=asks, timeout=TIMEOUT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in answer.headers["access-control-allow-headers"]
    other = {**asks, "Origin": "https://other.example"}
    answer = requests.options(f"{url}/v1/chat/completions", headers=other, timeout=TIMEOUT)
    assert "access-control-allow-origin" not in answer.headers
    for key, status in ((KEY, 200), ("wrong", 401)):
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
        answer = requests.get(f"{url}/v1/models", headers=headers, timeout=TIMEOUT)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_no_page_may_by_default(upstream: FakeTriton) -> None:
    with gateway(upstream.url) as url:
        asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        for answer in (
            requests.options(f"{url}/v1/completions", headers=asks, timeout=TIMEOUT),
            requests.get(f"{url}/v1/models", headers={"Origin": ORIGIN}, timeout=TIMEOUT),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_origin_is_scheme_and_host(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("example.com", "https://example.com/path", "ftp://example.com"):
        with pytest.raises(SystemExit):
            main(["--allowed-origins", wrong])
        assert f"{wrong!r} is no origin: give scheme and host" in capsys.readouterr().err


# --- usage


def usages(url: str, wanted: Any) -> list[Any]:
    """What the chunks of a stream say of usage; "absent" for those that have no such field."""
    body = {"model": "tandem", "prompt": "a b c", "stream": True, "stream_options": wanted}
    lines = send(url, "/v1/completions", body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    return [chunk.get("usage", "absent") for chunk in chunks]


def test_usage_is_null_before_the_last_chunk(url: str) -> None:
    *before, last = usages(url, {"include_usage": True})
    assert before == [None, None, None]
    assert (last["completion_tokens"], last["total_tokens"]) == (3, 8)


def test_usage_is_counted_as_chunks_come(url: str) -> None:
    *before, last = usages(url, {"include_usage": True, "continuous_usage_stats": True})
    assert before == [
        {"prompt_tokens": 5, "completion_tokens": done, "total_tokens": 5 + done}
        for done in (1, 2, 3)
    ]
    assert last["total_tokens"] == 8


@pytest.mark.parametrize("wanted", [None, {}, {"continuous_usage_stats": True}])
def test_usage_is_left_out_where_nobody_asks(url: str, wanted: Any) -> None:
    assert usages(url, wanted) == ["absent"] * 3


# --- bodies

BODY = json.dumps({"model": "tandem", "prompt": "a b"}).encode()


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_a_body_may_be_gzip(url: str, encoding: str) -> None:
    answer = send(url, "/v1/completions", gzip.compress(BODY), **{"Content-Encoding": encoding})
    assert answer.json()["choices"][0]["text"] == "ab"
    answer = send(url, "/v1/completions", BODY, **{"Content-Encoding": "identity"})
    assert answer.json()["choices"][0]["text"] == "ab"


def test_a_large_body_may_be_gzip(url: str) -> None:
    body = json.dumps({"model": "tandem", "prompt": "x" * (MOST - 100)}).encode()
    packed = gzip.compress(body)
    answer = send(url, "/v1/completions", packed, **{"Content-Encoding": "gzip"})
    assert len(answer.json()["choices"][0]["text"]) == MOST - 100
    wait_until(lambda: metric(url, "body_bytes") == 0)


def test_a_bomb_is_refused(url: str) -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(60)) + packer.flush()
    assert len(bomb) < MOST
    tracemalloc.start()
    try:
        answer = send(url, "/v1/completions", bomb, **{"Content-Encoding": "gzip"})
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413
    assert error_of(answer)["message"] == f"the body is larger than {MOST} bytes"
    wait_until(lambda: metric(url, "body_bytes") == 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BODY, "the body is not gzip: "),
        (b"", "the body's gzip ends too early"),
        (gzip.compress(BODY)[:-4], "the body's gzip ends too early"),
        (gzip.compress(BODY)[:-4] + b"1234", "the body is not gzip: "),
        (gzip.compress(BODY) + b"more", "something follows the body's gzip"),
    ],
)
def test_damaged_gzip_is_refused(url: str, body: bytes, message: str) -> None:
    answer = send(url, "/v1/completions", body, **{"Content-Encoding": "gzip"})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_gzip"
    assert error_of(answer)["message"].startswith(message)


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
def test_other_encodings_are_refused_by_name(url: str, encoding: str) -> None:
    answer = send(url, "/v1/completions", BODY, **{"Content-Encoding": encoding})
    assert answer.status_code == 415
    assert repr(encoding) in error_of(answer)["message"]
    assert answer.headers["accept-encoding"] == "gzip"
    assert ask(url).status_code == 200
