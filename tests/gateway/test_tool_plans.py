"""What a chat request makes of its tools: the grammar of an answer, and how it is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from tandem.requests.check_guides import answer
from tandem_gateway.tools.plan import Parsers, Plan, plan_of
from tool_requests import CALL, CITY, HERMES, NOW, request_of

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
