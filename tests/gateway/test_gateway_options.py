"""What clients of other servers send to the gateway, and what Triton is asked for then."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from gateway_setup import KEY, TIMEOUT, FakeTriton, ask, error_of, fake_triton, gateway, post
from tandem_gateway.models import meant_by
from tandem_gateway.schema import ChatCompletionRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "a b"}]


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url, KEY) as url:
        yield url


def chat(url: str, **more: Any) -> requests.Response:
    body = {"model": "tandem", "messages": MESSAGES, **more}
    return post(url, json.dumps(body), path="chat/completions")


NULLS = dict.fromkeys(
    (
        "n",
        "stream",
        "stream_options",
        "logprobs",
        "echo",
        "response_format",
        "tools",
        "tool_choice",
        "top_logprobs",
        "temperature",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "suffix",
        "user",
        "unheard_of",
    )
)


def test_several_answers_by_another_name(upstream: FakeTriton, url: str) -> None:
    assert ask(url, num_return_sequences=3).status_code == 200
    assert upstream.options["n"] == 3
    assert ask(url, n=2, num_return_sequences=3).status_code == 200
    assert upstream.options["n"] == 2
    refused = ask(url, num_return_sequences=65)
    assert refused.status_code == 400
    assert error_of(refused)["message"] == "n must be from 1 to 64, got 65"


def test_null_is_not_given(upstream: FakeTriton, url: str) -> None:
    assert ask(url, **NULLS).status_code == 200
    assert upstream.options == {}
    answer = chat(url, **NULLS)
    assert answer.status_code == 200
    assert upstream.options == {"max_tokens": 2**31 - 1}
    assert "x-tandem-ignored" not in answer.headers
    nested = {"stream": True, "stream_options": {"include_usage": None}}
    assert ask(url, **nested).status_code == 200


@pytest.mark.parametrize(
    ("sent", "options"),
    [
        ({"stop": ""}, {"stop": []}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"suffix": "", "best_of": 1, "use_beam_search": False, "length_penalty": 1}, {}),
        ({"metadata": {"a": "b"}, "store": True, "verbosity": "low", "priority": 0}, {}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"echo": True}, {"exclude_input_in_output": False}),
        ({"echo": True, "logprobs": 1, "max_tokens": 0}, {"exclude_input_in_output": False,
          "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 0}),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 3}, {"exclude_input_in_output": False,
          "logprobs": 1, "prompt_logprobs": 3}),
        ({"prompt_logprobs": "2", "logprobs": 1}, {"prompt_logprobs": 2, "logprobs": 1}),
        ({"nvext": {"ignore_eos": True, "greed_sampling": True, "annotations": []}},
         {"ignore_eos": True, "temperature": 0.0}),
        ({"guided_json": {"type": "object"}}, {"guided_json": {"type": "object"}}),
        ({"guided_choice": ["a", "b"]}, {"guided_choice": ["a", "b"]}),
        ({"allowed_token_ids": ["5", 6]}, {"allowed_token_ids": [5, 6]}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"temperature": "0.5", "top_k": "7"}, {"temperature": 0.5, "top_k": 7}),
        ({"truncate_prompt_tokens": 3, "add_special_tokens": False},
         {"truncate_prompt_tokens": 3, "add_special_tokens": False}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"response_format": {"type": "text"}}, {"response_format": {"type": "text"}}),
    ],
)  # fmt: skip
def test_others_words_are_understood(
    upstream: FakeTriton, url: str, sent: dict[str, Any], options: dict[str, Any]
) -> None:
    answer = ask(url, **sent)
    assert answer.status_code == 200, answer.text
    assert upstream.options == options
    assert "x-tandem-ignored" not in answer.headers


@pytest.mark.parametrize(
    ("sent", "name", "message"),
    [
        ({"use_beam_search": True}, "use_beam_search", "must be False, got True: there is no beam"),
        ({"best_of": 2}, "best_of", "best_of must be n, which is 1, got 2"),
        ({"suffix": "x"}, "suffix", "suffix must be left out, got 'x'"),
        ({"modalities": ["audio"]}, "modalities", "there is only text"),
        ({"temperature": "warm"}, "temperature", "temperature must be a number, got 'warm'"),
        ({"request_id": "a b"}, "request_id", "must have from 1 to 128 letters"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    url: str, sent: dict[str, Any], name: str, message: str
) -> None:
    answer = ask(url, **sent)
    assert answer.status_code == 400
    error = error_of(answer)
    assert message in error["message"]
    assert error["param"] == name


def test_top_logprobs_need_logprobs(upstream: FakeTriton, url: str) -> None:
    for more in ({}, {"logprobs": False}):
        answer = chat(url, top_logprobs=2, **more)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "top_logprobs"
        assert "logprobs: true" in error["message"]
    assert chat(url, top_logprobs=0).status_code == 200
    assert chat(url, top_logprobs=2, logprobs=True, max_tokens=0).status_code == 200
    assert upstream.options == {"logprobs": 2, "max_tokens": 0}


def test_a_chat_cannot_echo(url: str) -> None:
    answer = chat(url, echo=True)
    assert answer.status_code == 400
    assert "echo must be False with messages" in error_of(answer)["message"]
    assert chat(url, echo=False).status_code == 200


def test_an_unknown_field_is_named_and_ignored(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tandem.gateway"):
        for stream in (False, True):
            answer = ask(url, temprature=1, stream=stream, **{"ü,\n": 2})
            assert answer.status_code == 200
            assert answer.headers["x-tandem-ignored"] == "temprature,%C3%BC%2C%0A"
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "unknown option 'temprature'" in line]) == 1


def test_a_strict_gateway_refuses_it(upstream: FakeTriton) -> None:
    with gateway(upstream.url, strict=True) as url:
        answer = ask(url, temprature=1)
        assert answer.status_code == 400
        assert "temprature: there is no such field" in error_of(answer)["message"]
        assert error_of(answer)["param"] == "temprature"
        assert ask(url, metadata={}, best_of=1).status_code == 200


def test_a_request_has_the_name_that_it_asks_for(url: str) -> None:
    answer = ask(url, request_id="mine-1")
    assert answer.json()["id"] == "cmpl-mine-1"
    assert answer.headers["x-request-id"] == "cmpl-mine-1"


@pytest.mark.parametrize("name", ["openai/tandem", "hosted_vllm/tandem", "a/b/tandem"])
def test_a_models_name_may_have_a_provider(url: str, name: str) -> None:
    answer = ask(url, model=name)
    assert answer.json()["model"] == "tandem"


@pytest.mark.parametrize("name", ["other", "xtandem", "tandem/x", ""])
def test_another_model_is_not_found_unless_any_is_the_model(
    upstream: FakeTriton, url: str, name: str
) -> None:
    assert ask(url, model=name).status_code == 404
    with gateway(upstream.url, any_model=True) as tolerant:
        assert ask(tolerant, model=name).json()["model"] == "tandem"


def test_with_several_models_a_name_has_to_say_which() -> None:
    two = ["tandem", "tandem_chat"]
    assert meant_by("x/tandem_chat", two) == "tandem_chat"
    assert meant_by("x/y/b", ["b", "y/b"]) == "y/b"
    assert meant_by("gpt", two, any_name=True) is None


def test_the_newer_of_openais_names_wins() -> None:
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}
    assert ChatCompletionRequest.model_validate(body).options()["max_tokens"] == 6


def test_empty_tools_are_none() -> None:
    body = {"model": "m", "messages": MESSAGES, "tools": []}
    assert "tools" not in ChatCompletionRequest.model_validate(body).options()


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json; charset=utf-8"}])
def test_a_body_without_a_type_is_json(url: str, headers: dict[str, str]) -> None:
    body = json.dumps({"model": "tandem", "prompt": "x"}).encode()
    headers = {"Authorization": f"Bearer {KEY}", **headers}
    answer = requests.post(f"{url}/v1/completions", data=body, headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("headers", "got"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, "x-www-form-urlencoded"),
        ({"Origin": "https://example.com"}, "none"),
    ],
)
def test_a_body_of_another_type_is_refused(url: str, headers: dict[str, str], got: str) -> None:
    """Nor is one from a page that may be anyone's."""
    body = json.dumps({"model": "tandem", "prompt": "x"}).encode()
    headers = {"Authorization": f"Bearer {KEY}", **headers}
    answer = requests.post(f"{url}/v1/completions", data=body, headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 415
    assert "Content-Type must be application/json, got" in error_of(answer)["message"]
    assert got in error_of(answer)["message"]


def test_a_path_or_method_that_is_not_there_is_named(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.get(f"{url}/v1/completions", headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"
    assert error_of(answer) == {
        "message": "GET is not allowed at /v1/completions: use POST",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    answer = requests.post(f"{url}/v1/embeddings", headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 404
    assert error_of(answer)["message"] == "there is nothing at /v1/embeddings: see /v1/models"


def test_a_prompt_that_is_too_long_has_openais_code(upstream: FakeTriton, url: str) -> None:
    upstream.refusal = (
        "INVALID_ARG: the prompt is too long: this model's maximum context length is 16 tokens "
        "(max_model_len). However, your prompt resulted in 17 tokens"
    )
    answer = ask(url)
    upstream.refusal = ""
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"


def test_what_the_server_refuses_is_named(upstream: FakeTriton, url: str) -> None:
    upstream.refusal = "INVALID_ARG: top_k must be a whole number from -1 to 7, got 8"
    answer = ask(url)
    upstream.refusal = ""
    assert error_of(answer)["param"] == "top_k"


def test_prompts_that_are_sent_as_tokens_stay_so() -> None:
    body = {"model": "m", "prompt": [[5, 6], [7]]}
    assert CompletionRequest.model_validate(body).prompts == [[5, 6], [7]]
