"""Tools and reasoning through the gateway, before a Triton that writes what the test says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway_setup import KEY, FakeTriton, error_of, fake_triton, gateway, post
from tandem_gateway.tools.messages import for_template
from tandem_options import OptionError
from tool_requests import CALL, CITY, HERMES, MESSAGES, NAMED, TOOLS, WEATHER


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        fake.chat_models = {"tandem"}
        fake.template = HERMES
        yield fake


@pytest.fixture(scope="module")
def url(upstream: FakeTriton) -> Iterator[str]:
    with gateway(upstream.url, KEY) as url:
        yield url


def chat(url: str, **more: Any) -> requests.Response:
    body = {"model": "tandem", "messages": MESSAGES, "tools": TOOLS, **more}
    return post(url, json.dumps(body), path="chat/completions")


def whole_and_streamed(url: str, **more: Any) -> list[dict[str, Any]]:
    """The message, and the same joined from a stream's deltas, with their reasons."""
    whole = chat(url, **more)
    assert whole.status_code == 200, whole.text
    choice = ChatCompletion.model_validate(whole.json()).choices[0]
    message = choice.message.model_dump(exclude_none=True, exclude={"refusal"})
    for call in message.get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
    joined: dict[str, Any] = {}
    for line in chat(url, stream=True, **more).text.splitlines():
        if not line.startswith("data: {"):
            continue
        part = ChatCompletionChunk.model_validate_json(line.removeprefix("data: ")).choices[0]
        delta = part.delta.model_dump(exclude_none=True)
        joined["finish_reason"] = part.finish_reason
        for name in ("content", "reasoning_content"):
            if name in delta:
                joined[name] = joined.get(name, "") + delta[name]
        if "role" in delta:
            assert "role" not in joined
            joined["role"] = delta["role"]
        for call in delta.get("tool_calls", ()):
            calls = joined.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"type": call["type"], "function": {"name": "", "arguments": ""}})
            for name, text in call["function"].items():
                calls[call["index"]]["function"][name] += text
    return [message | {"finish_reason": choice.finish_reason}, joined]


def call_of(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        (
            f"Let me see. {CALL}",
            {},
            {
                "content": "Let me see.",
                "tool_calls": [call_of("weather", '{"city": "Paris"}')],
                "finish_reason": "tool_calls",
            },
        ),
        (
            CALL + '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
            {},
            {
                "tool_calls": [call_of("weather", '{"city": "Paris"}'), call_of("now", "{}")],
                "finish_reason": "tool_calls",
            },
        ),
        (
            CALL + '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
            {"parallel_tool_calls": False},
            {
                "tool_calls": [call_of("weather", '{"city": "Paris"}')],
                "finish_reason": "tool_calls",
            },
        ),
        (
            '[{"name": "now", "arguments": {}}]',
            {"tool_choice": "required"},
            {"tool_calls": [call_of("now", "{}")], "finish_reason": "tool_calls"},
        ),
        (
            '{"city": "Rome"}',
            {"tool_choice": NAMED},
            {"tool_calls": [call_of("weather", '{"city": "Rome"}')], "finish_reason": "tool_calls"},
        ),
        (CALL, {"tool_choice": "none"}, {"content": CALL, "finish_reason": "stop"}),
        (CALL, {"tools": []}, {"content": CALL, "finish_reason": "stop"}),
        (
            CALL,
            {"tools": None, "functions": [WEATHER["function"]], "function_call": "auto"},
            {
                "tool_calls": [call_of("weather", '{"city": "Paris"}')],
                "finish_reason": "tool_calls",
            },
        ),
        (
            '{"city": "Rome"}',
            {
                "tools": None,
                "functions": [WEATHER["function"]],
                "function_call": {"name": "weather"},
            },
            {"tool_calls": [call_of("weather", '{"city": "Rome"}')], "finish_reason": "tool_calls"},
        ),
    ],
)
def test_calls_are_read(
    upstream: FakeTriton, url: str, text: str, more: dict[str, Any], expected: dict[str, Any]
) -> None:
    upstream.text = text
    for found in whole_and_streamed(url, **more):
        assert found == {"role": "assistant", **expected}


def test_what_a_model_thinks_is_told_apart(upstream: FakeTriton) -> None:
    """Whether it writes the first mark, or its template does."""
    for template, text in (
        ("<think> {% if add_generation_prompt %}assistant", "<think>\nHm.\n</think>\n\nYes."),
        ("{% if add_generation_prompt %}assistant<think>\n", "Hm.\n</think>\n\nYes."),
    ):
        upstream.template, upstream.text = template, text
        # The template is asked for once.
        with gateway(upstream.url, KEY) as url:
            for found in whole_and_streamed(url, tools=None):
                assert found["reasoning_content"].strip() == "Hm."
                assert found["content"] == "Yes."
    upstream.template = HERMES


def test_a_forced_call_is_a_guide(upstream: FakeTriton, url: str) -> None:
    upstream.text = '{"city": "Rome"}'
    assert chat(url, tool_choice=NAMED).status_code == 200
    closed = {"additionalProperties": False} | CITY
    assert upstream.options["structured_outputs"] == {"json": closed}
    upstream.text = "[]"
    assert chat(url, tool_choice="required").status_code == 200
    grammar = upstream.options["structured_outputs"]["grammar"]
    assert json.dumps(closed)[1:-1] in grammar
    assert 'start: "[" call (", " call)* "]"' in grammar
    assert chat(url, tool_choice="required", parallel_tool_calls=False).status_code == 200
    assert 'start: "[" call "]"' in upstream.options["structured_outputs"]["grammar"]


def test_strict_that_cannot_be_honoured_is_named(upstream: FakeTriton) -> None:
    """Where calls are no JSON, or the template knows none: it is the default of some clients."""
    upstream.text = "Yes."
    for template in ("<|tool_call>", "no tools"):
        upstream.template = template
        with gateway(upstream.url, KEY) as url:
            answer = chat(url)
            assert answer.json()["choices"][0]["message"]["content"] == "Yes."
            assert answer.headers["x-tandem-ignored"] == "tools.function.strict"
    upstream.template = HERMES


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tool_choice": {"function": {"name": "other"}}}, "tool_choice must be one of weather"),
        ({"tool_choice": "required", "tools": []}, "tool_choice needs tools"),
        ({"tool_choice": NAMED, "tools": None}, "tool_choice needs tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0 must be of type 'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0 must be"),
        (
            {"tools": [{"function": {"name": "f", "parameters": ["x"]}}]},
            "tools.0.function.parameters must be a schema",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format must not be given where tool_choice",
        ),
    ],
)
def test_wrong_tools_are_refused(url: str, more: dict[str, Any], said: str) -> None:
    refused = chat(url, **more)
    assert refused.status_code == 400
    assert said in error_of(refused)["message"]


def test_messages_as_clients_send_them_back() -> None:
    call = {"id": "1", "type": "function"}
    sent = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, "b"], "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**call, "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "function_call": {"name": "g", "arguments": ""}},
        {"role": "function", "name": "g", "content": "3"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "refusal", "refusal": "no"},
            ],
            "tool_calls": [],
        },
    ]
    assert for_template(sent, "") == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {}}}],
        },
        {"role": "tool", "name": "g", "content": "3"},
        {"role": "assistant", "content": "no"},
    ]
    assert for_template(sent[:1], "developer")[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "got 'image_url'"),
        ({"content": 3}, "got 'int'"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "is not valid JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "a JSON object"),
        ({"tool_calls": 5}, "tool_calls must be a list"),
        ({"content": [{"type": ["text"]}]}, "text only"),
        ({"content": [{"type": "text", "text": {"a": 1}}]}, "text only"),
        ({"tool_calls": ["f"]}, "calls of functions, got 'f'"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(message: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        for_template([{"role": "user", "content": "a"}, {"role": "user", **message}], "")
    assert str(caught.value).startswith("messages.1")
