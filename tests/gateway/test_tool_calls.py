"""Tool calls and reasoning are read from a text the same however it is cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandem_gateway.tools.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    reasoning_format_of,
    tool_format_of,
)
from tandem_gateway.tools.reader import FORCED, AnswerReader

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"type": "array"},
        },
    },
    "now": {},
}
PARIS = {"city": "Paris", "days": 3}


def read(reader: AnswerReader, *texts: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and each call's name and arguments."""
    reasoning, content, calls = "", "", []
    for number, text in enumerate(texts, 1):
        for piece in reader.feed(text, is_last=number == len(texts)):
            if piece.kind == "name":
                calls.append((piece.text, ""))
            elif piece.kind == "arguments":
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
            elif piece.kind == "content":
                content += piece.text
            else:
                reasoning += piece.text
    return reasoning, content, calls


def reader_of(name: str, **more: Any) -> AnswerReader:
    return AnswerReader(calls=TOOL_FORMATS[name], schemas=SCHEMAS, **more)


def parsed(name: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    _, content, calls = read(reader_of(name), text)
    return content, [(call, json.loads(arguments)) for call, arguments in calls]


ARGUMENTS = '{"city": "Paris", "days": 3}'
OBJECT = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
CALLS = [
    ("hermes", f"<tool_call>\n{OBJECT}\n</tool_call>"),
    ("hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "weather"}}</tool_call>'),
    ("hermes", f'<tool_call>{{"name":"weather","arguments":{json.dumps(ARGUMENTS)}}}'),
    ("llama3_json", OBJECT.replace("arguments", "parameters") + "<|eom_id|>"),
    ("llama3_json", '<|python_tag|>{"type": "function", ' + OBJECT[1:]),
    ("pythonic", '[weather(city="Paris", days=3)]'),
    ("pythonic", "<|python_start|>[weather(city='Paris', days=3)]<|python_end|><|eot|>"),
    ("mistral", f'[TOOL_CALLS][{OBJECT[:-1]}, "id": "abcdefghi"}}]</s>'),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}"),
    ("mistral", f"[TOOL_CALLS]weather{ARGUMENTS}"),
    (
        "qwen3_coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    ),
    ("gemma4", '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|><turn|>'),
]
NOW = '{"name": "now", "arguments": {}}'
ROME = '{"name": "weather", "arguments": {"city": "a\\"}{"}}'
SEVERAL = [
    ("hermes", f"<tool_call>\n{NOW}\n</tool_call>\n<tool_call>\n{ROME}\n</tool_call>"),
    ("llama3_json", f"{NOW}; {ROME}"),
    ("pythonic", "[now(), weather(city='a\"}{')]"),
    ("mistral", f"[TOOL_CALLS] [{NOW}, {ROME}]"),
    ("mistral", '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]weather[ARGS]{"city": "a\\"}{"}'),
    (
        "qwen3_coder",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n"
        '<parameter=city>\na"}{\n</parameter>\n</function>\n</tool_call>',
    ),
    (
        "gemma4",
        "<|tool_call>call:now{}<tool_call|>"
        '<|tool_call>call:weather{city:<|"|>a"}{<|"|>}<tool_call|><|tool_response>',
    ),
]
BROKEN = [
    ("hermes", '<tool_call>{"name": "weather", "arguments": 3}</tool_call>'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather"'),
    ("hermes", "<tool_call> what?</tool_call>"),
    ("hermes", "a <tool_"),
    ("llama3_json", '{"answer": {"name": "weather"}} '),
    ("llama3_json", "{" * 2000),
    ("pythonic", "[1, 2]"),
    ("pythonic", "[weather('Paris')]"),
    ("pythonic", "[weather(city=f'{1}')]"),
    ("pythonic", "[weather(city=" + "-" * 20_000 + "1)]"),
    ("mistral", "[TOOL_CALLS] none"),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</function>"),
    ("qwen3_coder", "<tool_call><function=weather><parameter=city></function></tool_call>"),
    ("gemma4", "<|tool_call>call:weather{city:Paris}<tool_call|>"),
    ("gemma4", "<|tool_call>weather<tool_call|>"),
]


@pytest.mark.parametrize(("name", "text"), CALLS)
def test_a_call(name: str, text: str) -> None:
    assert parsed(name, text) == ("", [("weather", PARIS)])


@pytest.mark.parametrize(("name", "text"), SEVERAL)
def test_several_calls(name: str, text: str) -> None:
    assert parsed(name, text) == ("", [("now", {}), ("weather", {"city": 'a"}{'})])


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert parsed(name, text) == (text, [])


def test_text_around_calls_is_content() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert parsed("hermes", f"I'll look.\n\n{call}\n") == ("I'll look.", [("now", {})])
    assert parsed("hermes", f"a {call} b\n") == ("a b", [("now", {})])
    assert parsed("hermes", " \n a < b \n") == (" \n a < b \n", [])


def test_values_of_all_kinds() -> None:
    content, calls = parsed(
        "gemma4",
        '<|tool_call>call:weather{where:[{lat:1.5,ok:true},<|"|>a:b,c:<|"|>],city:null}<tool_call|>',
    )
    assert calls == [("weather", {"where": [{"lat": 1.5, "ok": True}, "a:b,c:"], "city": None})]
    content, calls = parsed("pythonic", "[weather(where=[-1, {'a': None}, (true,)], days=False)]")
    assert calls == [("weather", {"where": [-1, {"a": None}, [True]], "days": False})]
    parameters = "<parameter=city>\n3\n</parameter><parameter=where>[1]</parameter>"
    content, calls = parsed(
        "qwen3_coder", f"<tool_call><function=weather>{parameters}</function></tool_call>"
    )
    assert calls == [("weather", {"city": "3", "where": [1]})]
    assert content == ""


def test_arguments_come_as_they_are_written() -> None:
    """The name first; and a call whose arguments break off keeps what there is of them."""
    reader = reader_of("hermes")
    steps = ['<tool_call>{"name": "wea', 'ther", "arguments":', ' {"ci', 'ty": "Pa', "ris"]
    pieces = [
        [(piece.kind, piece.text) for piece in reader.feed(text, is_last=text == "ris")]
        for text in steps
    ]
    assert pieces == [
        [],
        [],
        [("name", "weather"), ("arguments", '{"ci')],
        [("arguments", 'ty": "Pa')],
        [("arguments", "ris")],
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"name": {"first": "Ann"}, "age": 3}'),
        ("hermes", '<tool_call>{"arguments": {}, "name": ["now"]}</tool_call>'),
    ],
)
def test_an_object_with_another_name_is_content(name: str, text: str) -> None:
    assert parsed(name, text) == (text, [])


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "5"),
        ({"type": "integer"}, 5),
        ({"type": ["string", "null"]}, "5"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ({}, "5"),
    ],
)
def test_values_between_marks_have_the_schemas_type(schema: dict[str, Any], value: Any) -> None:
    text = "<tool_call><function=f><parameter=x>5</parameter></function></tool_call>"
    reader = AnswerReader(
        calls=TOOL_FORMATS["qwen3_coder"], schemas={"f": {"properties": {"x": schema}}}
    )
    _, _, [(_, arguments)] = read(reader, text)
    assert json.loads(arguments) == {"x": value}


def test_only_so_many_calls() -> None:
    for name, text in SEVERAL:
        _, content, calls = read(reader_of(name, max_calls=1), text)
        assert (content, calls) == ("", [("now", "{}")])


def test_calls_that_were_asked_for() -> None:
    text = '[{"name": "weather", "arguments": {"days": 1}}, {"name": "now", "arguments": {}}]'
    _, content, calls = read(AnswerReader(calls=FORCED, schemas=SCHEMAS), text)
    assert (content, calls) == ("", [("weather", '{"days": 1}'), ("now", "{}")])
    reader = AnswerReader(named="weather")
    assert read(reader, '{"da', 'ys": 1}') == ("", "", [("weather", '{"days": 1}')])


THINKING = [
    ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
    ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
    ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("<think>Hm.", False, "Hm.", ""),
    (" Yes, <think> is a mark", False, "", " Yes, <think> is a mark"),
    ("", False, "", ""),
]


@pytest.mark.parametrize(("text", "is_thinking", "reasoning", "content"), THINKING)
def test_reasoning(text: str, is_thinking: bool, reasoning: str, content: str) -> None:
    marks = REASONING_FORMATS["think"]
    reader = AnswerReader(reasoning=marks, is_thinking=is_thinking)
    assert read(reader, text) == (reasoning, content, [])


def test_calls_follow_reasoning() -> None:
    text = "<|channel>thought\nHm <|tool_call><channel|><|tool_call>call:now{}<tool_call|>"
    reader = reader_of("gemma4", reasoning=REASONING_FORMATS["gemma4"])
    assert read(reader, text) == ("Hm <|tool_call>", "", [("now", "{}")])


# Texts that have all that readers look at, in any order.
PARTS = st.sampled_from(
    [
        *("<think>", "</think>", " ", "\n", "x", "{", "}", '"', "\\", "now", "; ", ", ", "[", "]"),
        *("<tool_call>", "</tool_call>", "<|tool_call>", "<tool_call|>", "[TOOL_CALLS]", "[ARGS]"),
        *(NOW, '{"a": 1}', "now()", "call:now{}", "<|eom_id|>", "</s>", "<|python_tag|>"),
        *("<function=now></function>", '{"name": "weather", "arguments": {"city": "'),
    ]
)
WORDS = st.lists(PARTS, max_size=8).map("".join)
KNOWN = st.sampled_from([text for _, text in CALLS + SEVERAL + BROKEN if len(text) < 1000])
TEXTS = st.one_of(WORDS, st.tuples(WORDS, KNOWN, WORDS).map("".join))


@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200)),
    name=st.sampled_from([*TOOL_FORMATS, ""]),
    thinks=st.booleans(),
)
@example(text=SEVERAL[0][1], cuts=list(range(200)), name="hermes", thinks=True)
def test_it_is_the_same_however_it_is_cut(
    text: str, cuts: list[int], name: str, thinks: bool
) -> None:
    def reader() -> AnswerReader:
        marks = REASONING_FORMATS["think"] if thinks else None
        return reader_of(name, reasoning=marks) if name else AnswerReader(reasoning=marks)

    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[start:end] for start, end in pairwise(places)]
    assert read(reader(), *parts, "") == read(reader(), text)


@given(text=st.text(alphabet="ab <[{\n"))
def test_a_plain_text_stays_as_it_is(text: str) -> None:
    for name in TOOL_FORMATS:
        assert read(reader_of(name), text) == ("", text, [])


def test_formats_are_found_in_templates() -> None:
    signs = {
        "{{ '<|tool_call>call:' + name }}": ("gemma4", None),
        "<|channel>thought": (None, "gemma4"),
        "<tool_call>\\n<function=example>": ("qwen3_coder", None),
        "within <tool_call></tool_call> tags; {{ '<think>' }}": ("hermes", "think"),
        "[TOOL_CALLS][": ("mistral", None),
        "[THINK]": (None, "mistral"),
        "<|python_start|>": ("pythonic", None),
        '{"name": function name, "parameters": dictionary of argument': ("llama3_json", None),
        "{{ '<|im_start|>' + message['role'] }}": (None, None),
    }
    for template, (tools, reasoning) in signs.items():
        assert tool_format_of(template) is (TOOL_FORMATS[tools] if tools else None)
        found = REASONING_FORMATS[reasoning] if reasoning else None
        assert reasoning_format_of(template) is found
