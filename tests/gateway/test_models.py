"""Which models a gateway offers, and which of them answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import requests

from gateway_setup import KEY, TIMEOUT, FakeTriton, ask, error_of, fake_triton, gateway, wait_until
from tandem_gateway import models


@pytest.fixture
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        fake.models = {"tandem_chat": "tandem", "resnet": "onnxruntime", "tandem": "tandem"}
        fake.chat_models = {"tandem_chat"}
        yield fake


@pytest.fixture
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url, KEY) as url:
        yield url


def get(url: str, path: str) -> requests.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return requests.get(f"{url}{path}", headers=headers, timeout=TIMEOUT)


def listed(url: str) -> list[str]:
    return [card["id"] for card in get(url, "/v1/models").json()["data"]]


def test_all_models_with_our_backend_are_listed(url: str) -> None:
    cards = get(url, "/v1/models").json()["data"]
    assert [(card["id"], card["has_chat_template"]) for card in cards] == [
        ("tandem", False),
        ("tandem_chat", True),
    ]
    assert get(url, "/v1/models/tandem_chat").json() == cards[1]
    assert cards[1]["max_model_len"] == 2048


def test_the_name_in_the_request_picks_the_model(upstream: FakeTriton, url: str) -> None:
    for name in ("tandem_chat", "tandem"):
        answer = ask(url, model=name).json()
        assert answer["model"] == upstream.asked[-1] == name


@pytest.mark.parametrize("name", ["gpt", "resnet", ""])
def test_a_model_that_is_not_there_is_404_and_names_those_that_are(url: str, name: str) -> None:
    answer = ask(url, model=name)
    assert answer.status_code == 404
    error = error_of(answer)
    assert error["message"] == (
        f"the model {name!r} does not exist; this server has 'tandem' and 'tandem_chat'"
    )
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    if name:
        assert error_of(get(url, f"/v1/models/{name}")) == error


def test_a_model_that_was_loaded_meanwhile_is_found(upstream: FakeTriton, url: str) -> None:
    assert "late" not in listed(url)
    upstream.models["late"] = "tandem"
    wait_until(lambda: ask(url, model="late").status_code == 200)
    del upstream.models["late"]
    wait_until(lambda: listed(url) == ["tandem", "tandem_chat"])


def test_the_server_is_asked_once_a_second_at_most(upstream: FakeTriton, url: str) -> None:
    before, started_at = upstream.num_indexed, time.monotonic()
    for _ in range(50):
        assert ask(url, model="gpt").status_code == 404
    assert upstream.num_indexed - before <= time.monotonic() - started_at + 1


def test_a_model_that_was_loaded_anew_is_described_anew(
    upstream: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that doesn't say just now is what it was."""
    monkeypatch.setattr(models, "_DESCRIBED_SECONDS", 0.0)
    with gateway(upstream.url, KEY) as url:
        assert get(url, "/v1/models/tandem").json()["has_chat_template"] is False
        upstream.chat_models.add("tandem")
        assert get(url, "/v1/models/tandem").json()["has_chat_template"] is True
        upstream.chat_models.remove("tandem")
        upstream.dead_models = {"tandem"}
        assert get(url, "/v1/models/tandem").json()["has_chat_template"] is True


def test_models_that_were_named_are_the_only_ones(upstream: FakeTriton) -> None:
    with gateway(upstream.url, KEY, models=["tandem_chat"]) as url:
        assert listed(url) == ["tandem_chat"]
        assert ask(url, model="tandem_chat").status_code == 200
        assert "this server has 'tandem_chat'" in error_of(ask(url, model="tandem"))["message"]
    assert upstream.num_indexed == 0


@pytest.mark.slow
def test_a_gateway_is_ready_when_all_its_models_are(upstream: FakeTriton, url: str) -> None:
    assert get(url, "/health").status_code == 200
    upstream.dead_models = {"tandem_chat"}
    wait_until(lambda: get(url, "/health").status_code == 503, 7)
    # It is still listed, and the other one answers.
    assert listed(url) == ["tandem", "tandem_chat"]
    assert ask(url, model="tandem").status_code == 200


def test_a_server_without_our_models_is_not_ready(upstream: FakeTriton, url: str) -> None:
    upstream.models = {"resnet": "onnxruntime"}
    assert get(url, "/health").status_code == 503
    assert "this server has none" in error_of(ask(url))["message"]


def test_a_server_that_keeps_its_models_secret_wants_a_name(upstream: FakeTriton, url: str) -> None:
    upstream.keeps_models_secret = True
    assert get(url, "/health").status_code == 503
    message = error_of(ask(url))["message"]
    assert message.startswith("the server doesn't say which models it has (PERMISSION_DENIED")
    assert message.endswith("name one, with --model")
