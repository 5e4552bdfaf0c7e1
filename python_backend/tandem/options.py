"""One request's options as clients send them: JSON or parameters, numbers or numeric strings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.errors import InvalidRequestError
from tandem.params import SamplingParams

_SAMPLING = {
    field.name: str(field.type).removesuffix(" | None")
    for field in dataclasses.fields(SamplingParams)
}
_KINDS = {"drafter": "str", "num_speculative_tokens": "int", "stream": "bool", **_SAMPLING}
_NOUNS = {"str": "a string", "bool": "true or false", "int": "a whole number", "float": "a number"}
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class RequestOptions:
    """Everything but the prompt."""

    params: SamplingParams
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    stream: bool = False


def parse_options(*sources: Mapping[str, Any]) -> RequestOptions:
    """Reads options from mappings, of which earlier ones win.

    Raises:
        InvalidRequestError: naming the option, its value, and what is allowed.
    """
    given: dict[str, Any] = {}
    for source in reversed(sources):
        given |= source
    unknown = sorted(set(given) - set(_KINDS))
    if unknown:
        raise InvalidRequestError(
            f"unknown parameter {unknown[0]!r}; allowed: {', '.join(sorted(_KINDS))}"
        )
    values = {
        name: _convert(name, value, _KINDS[name])
        for name, value in given.items()
        if value is not None
    }
    own = {name: values.pop(name) for name in list(values) if name not in _SAMPLING}
    return RequestOptions(SamplingParams(**values), **own)


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Reads a JSON object that a client sent in the input `name`.

    Raises:
        InvalidRequestError: it isn't JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name} must be a JSON object, got {_short(value)}")
    return value


def _convert(name: str, value: Any, kind: str) -> Any:
    """Clients such as genai-perf send every number as a string."""
    try:
        if kind == "str":
            if isinstance(value, str):
                return value
        elif kind == "bool":
            return value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return _integer(value) if kind == "int" else float(value)
    except (KeyError, ValueError, OverflowError):
        pass  # refused below, as any other value
    raise InvalidRequestError(f"{name} must be {_NOUNS[kind]}, got {_short(value)}")


def _integer(value: str | int | float) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
