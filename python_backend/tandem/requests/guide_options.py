"""What the text must match, in the words of several servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tandem.errors import InvalidRequestError, shorten
from tandem.requests.params import Guide
from tandem_options.values import convert

# TensorRT-LLM's.
_TYPES = {
    "json_schema": "json",
    "regex": "regex",
    "ebnf_grammar": "grammar",
}
# vLLM's, until it had structured_outputs.
_KINDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
NAMES = frozenset(
    (
        "structured_outputs",
        "response_format",
        *_KINDS,
        "guided_whitespace_pattern",
        "guided_decoding_guide_type",
        "guided_decoding_guide",
    )
)
# Of structured_outputs, beside the guide itself.
_NO_SPACE, _SPACE = "disable_any_whitespace", "whitespace_pattern"
# Change nothing here.
_IDLE = ("disable_fallback", "disable_additional_properties")


def parse_guide(values: Mapping[str, Any]) -> Guide | None:
    """The guide that is asked for, by options whose names are `NAMES`.

    Raises:
        InvalidRequestError, OptionError: naming the option and what is allowed.
    """
    guides = {
        **{name: {kind: values[name]} for name, kind in _KINDS.items() if name in values},
        "structured_outputs": values.get("structured_outputs"),
        "response_format": _response_format(values.get("response_format")),
        "guided_decoding_guide": _guide_of_type(values),
    }
    given = {name: guide for name, guide in guides.items() if guide is not None}
    if len(given) > 1:
        raise InvalidRequestError(f"only one guide can hold, got {' and '.join(sorted(given))}")
    if not given:
        return None
    ((name, guide),) = given.items()
    if name in _KINDS:
        guide = {**guide, _SPACE: values.get("guided_whitespace_pattern")}
    return _structured_outputs(guide)


def _response_format(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's."""
    kind = (value or {}).get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":  # Some send a schema with it.
        schema = (value or {}).get("schema")
        return {"json_object": True} if schema is None else {"json": schema}
    if kind != "json_schema":
        raise InvalidRequestError(
            "response_format.type must be text, json_object or json_schema, got " + shorten(kind)
        )
    schema = (value or {}).get("json_schema")
    inner = schema.get("schema") if isinstance(schema, Mapping) else None
    if inner is None:
        raise InvalidRequestError("response_format.json_schema is missing")
    return {"json": inner}


def _guide_of_type(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """TensorRT-LLM's."""
    kind, text = (values.get(f"guided_decoding_guide{suffix}") for suffix in ("_type", ""))
    if not kind and not text:
        return None
    if kind == "json":
        return {"json": "{}"}
    if kind not in _TYPES:
        known = ", ".join(["json", *_TYPES])
        raise InvalidRequestError(
            f"guided_decoding_guide_type must be one of {known}, got {shorten(kind)}"
        )
    return {_TYPES[kind]: text or ""}


def _structured_outputs(given: Mapping[str, Any]) -> Guide:
    """The shape that vLLM has."""
    values = {
        name: value
        for name, value in given.items()
        if value is not None and value is not False and name not in _IDLE
    }
    space = _space(values.pop(_NO_SPACE, False), values.pop(_SPACE, None))
    if len(values) != 1:
        raise InvalidRequestError(
            "structured_outputs must have exactly one of json, json_object, regex, choice and "
            f"grammar, got {shorten(sorted(values))}"
        )
    ((kind, value),) = values.items()
    if kind == "choice":
        return Guide(kind, choices=convert("choice", value, "strings"))
    if kind == "json_object":
        return Guide(kind, space=space)
    if kind == "json" and isinstance(value, (dict, bool)):
        value = json.dumps(value)
    return Guide(kind, convert(kind, value, "str"), space=space if kind == "json" else None)


def _space(is_none: Any, pattern: Any) -> str | None:
    if convert(_NO_SPACE, is_none, "bool"):
        return ""
    return None if pattern is None else str(convert(_SPACE, pattern, "str"))
