"""What a request asks for, as the engine takes it."""

from __future__ import annotations

from typing import Any

import pytest

from tandem import Guide, InvalidRequestError
from tandem.requests.options import PromptOptions, parse_options

SCHEMA = {"type": "object"}
TEXT = '{"type": "object"}'


@pytest.mark.parametrize(
    ("sent", "guide"),
    [
        ({}, None),
        ({"structured_outputs": None, "response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, Guide("json", TEXT)),
        ({"structured_outputs": {"json": TEXT, "regex": None}}, Guide("json", TEXT)),
        ({"structured_outputs": {"json_object": True}}, Guide("json_object")),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            Guide("json", TEXT, space=""),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
            Guide("json", TEXT, space=" ?"),
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_fallback": True}},
            Guide("regex", "a"),
        ),
        ({"guided_json": SCHEMA}, Guide("json", TEXT)),
        ({"json_schema": TEXT}, Guide("json", TEXT)),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            Guide("json", TEXT, space=" ?"),
        ),
        ({"guided_regex": "a"}, Guide("regex", "a")),
        ({"regex": "a"}, Guide("regex", "a")),
        ({"guided_choice": ["a", "b"]}, Guide("choice", choices=("a", "b"))),
        ({"guided_grammar": "start: X"}, Guide("grammar", "start: X")),
        ({"ebnf": "start: X"}, Guide("grammar", "start: X")),
        ({"nvext": {"guided_regex": "a"}}, Guide("regex", "a")),
        ({"guided_decoding_guide_type": "json"}, Guide("json", "{}")),
        (
            {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a"},
            Guide("regex", "a"),
        ),
        ({"response_format": {"type": "json_object"}}, Guide("json_object")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Guide("json", TEXT)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            Guide("json", TEXT),
        ),
    ],
)
def test_guides_by_every_name(sent: dict[str, Any], guide: Guide | None) -> None:
    assert parse_options(sent).params.guide == guide


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            {"response_format": {"type": "yaml"}},
            "response_format.type must be text",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ({"guided_regex": "a", "ebnf": "b"}, "only one guide can hold, got guided_grammar and gui"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "must have exactly one of json"),
        ({"guided_choice": []}, "choice must hold at least one string"),
        (
            {"truncate_prompt_tokens": -2},
            "truncate_prompt_tokens must be a whole number",
        ),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
        ({"seed": -(2**63) - 1}, "seed must be a whole number from 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_options(sent)


def test_how_a_prompt_is_read() -> None:
    sent = {"truncate_prompt_tokens": "5", "add_special_tokens": "false", "request_id": "r"}
    options = parse_options(sent, {"unheard_of": 1})
    assert options.prompt == PromptOptions(truncate_prompt_tokens=5, add_special_tokens=False)
    assert options.request_id == "r"
    assert options.unknown == ("unheard_of",)
