"""Tools and reasoning through the gateway, before a Triton that writes what the test says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from llguidance import LLMatcher, LLTokenizer
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway_setup import KEY, FakeTriton, error_of, fake_triton, gateway, post
from tandem.requests.check_guides import answer
from tandem_gateway.schema import ChatCompletionRequest
from tandem_gateway.tools.messages import for_template
from tandem_gateway.tools.plan import Parsers, Plan, plan_of
from tandem_options import OptionError

HERMES = "<tool_call></tool_call> {% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "weather"}}
MESSAGES = [{"role": "user", "content": "a"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def request_of(**more: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(**{"model": "m", "messages": MESSAGES, "tools": TOOLS, **more})


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


LLAMA = '"parameters": dictionary'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}'


def strict_plan(template: str, **more: Any) -> Plan:
    plan = plan_of(request_of(**more), template, Parsers())
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("template", "text", "num_calls"),
    [
        (HERMES, "It is sunny: {", 0),
        (HERMES, "", 0),
        (HERMES, "Well, <tool_call", 0),
        (HERMES, CALL, 1),
        (
            HERMES,
            f'I ask. {CALL} <tool_call>{{"name": "now", "arguments": {{"a": 1}}}}</tool_call>.',
            2,
        ),
        (LLAMA, "It is sunny: {", 0),
        (LLAMA, LLAMA_CALL, 1),
        (LLAMA, f'{LLAMA_CALL}; {{"name": "now", "parameters": {{}}}}\n', 2),
    ],
)
def test_a_strict_function_leaves_the_text_free(template: str, text: str, num_calls: int) -> None:
    """And what may be written as a call is read as one."""
    plan = strict_plan(template)
    assert matches(plan, text)
    reader = plan.reader()
    pieces = [piece for letter in text for piece in reader.feed(letter, is_last=False)]
    pieces += reader.feed("", is_last=True)
    assert sum(piece.kind == "name" for piece in pieces) == num_calls
    assert plan.ignored == []


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, CALL.replace("city", "town")),
        (HERMES, CALL.replace('"Paris"', "7")),
        (HERMES, CALL.replace("weather", "climate")),
        (HERMES, "<tool_call> none </tool_call>"),
        (HERMES, CALL.removesuffix("</tool_call>")),
        (LLAMA, LLAMA_CALL.replace("city", "town")),
        (LLAMA, f"{LLAMA_CALL}; so"),
        (LLAMA, ' {"weather": 1}'),
    ],
)
def test_calls_of_a_strict_function_follow_its_schema(template: str, text: str) -> None:
    assert not matches(strict_plan(template), text)


def matches(plan: Plan, text: str) -> bool:
    grammar = plan.options["structured_outputs"]["grammar"]
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(grammar))
    token_ids = list(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def test_strict_where_it_asks_for_nothing_more() -> None:
    """One call at most, none, what nobody asks for, and where the text is guided already."""
    plan = strict_plan(HERMES, parallel_tool_calls=False)
    assert "start: marked? TEXT" in plan.options["structured_outputs"]["grammar"]
    assert "structured_outputs" not in strict_plan(HERMES, tools=[NOW]).options
    guided = strict_plan(HERMES, response_format={"type": "json_object"})
    assert "structured_outputs" not in guided.options
    assert plan_of(request_of(tool_choice="none"), HERMES, Parsers()) is None


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


REFERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "properties": {"const": {"properties": 1}}},
    "$defs": {"City": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
PARTS = [{"type": "object", "properties": {name: {}}, "required": [name]} for name in "ab"]


def test_any_schema_can_be_forced() -> None:
    """What refers to itself, holds together with others, or has odd names in it."""
    schemas = {"refers": REFERS, "combined": {"allOf": PARTS}, 'q"\\x ::= y': CITY}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in schemas.items()
    ]
    plan = plan_of(request_of(tools=tools, tool_choice="required"), "", Parsers())
    assert plan is not None
    grammar = plan.options["structured_outputs"]["grammar"]
    assert "error" not in answer("grammar", grammar)
    for name in schemas:
        choice = {"type": "function", "function": {"name": name}}
        plan = plan_of(request_of(tools=tools, tool_choice=choice), "", Parsers())
        assert plan is not None
        schema = plan.options["structured_outputs"]["json"]
        assert "error" not in answer("json", json.dumps(schema))
        if name == "refers":
            assert schema["additionalProperties"] is False
            assert schema["$defs"]["City"]["additionalProperties"] is False
            assert schema["properties"] == REFERS["properties"]


def test_a_text_that_must_match_holds_no_thoughts() -> None:
    """A grammar of JSON never writes the mark behind which the answer would begin."""
    template = "{% if add_generation_prompt %}assistant<think>\n"
    for more in (
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "[0-9]"},
    ):
        assert plan_of(request_of(tools=None, **more), template, Parsers()) is None
    plan = plan_of(request_of(tools=None, continue_final_message=True), template, Parsers())
    assert plan is not None
    assert plan.arguments["is_thinking"] is False


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


def test_marks_that_are_special_tokens_are_asked_for() -> None:
    plan = plan_of(request_of(tools=[NOW]), "[TOOL_CALLS]", Parsers())
    assert plan is not None
    assert plan.options == {"skip_special_tokens": False}
    plan = plan_of(request_of(tools=[NOW]), HERMES, Parsers())
    assert plan is not None
    assert plan.options == {}


def test_a_parser_can_be_told() -> None:
    plan = plan_of(request_of(), "", Parsers(tools="mistral"))
    assert plan is not None
    pieces = plan.reader().feed('[TOOL_CALLS][{"name": "now", "arguments": {}}]', is_last=True)
    assert [piece.kind for piece in pieces] == ["name", "arguments"]
    assert plan_of(request_of(tools=[NOW]), HERMES, Parsers(tools="none")) is None
    assert plan_of(request_of(tools=None), "<think>", Parsers(reasoning="none")) is None


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
