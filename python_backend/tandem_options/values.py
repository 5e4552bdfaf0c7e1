"""Values as clients write them, by kind: genai-perf sends every number as a string, for example."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tandem_options.errors import OptionError, shorten
from tandem_options.json_size import check_json

_MAX_BIASES = 1024
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_NOUNS = {
    "str": "a string",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "texts": "a list of strings",
    "strings": "a list of strings",
    "ints": "a list of whole numbers",
    "floats": "a list of numbers",
    "biases": "an object of token ids and numbers",
    "object": "an object",
    "objects": "a list of objects",
}


def convert(name: str, value: Any, kind: str) -> Any:
    """The value as Python has it; lists are tuples.

    Raises:
        OptionError: naming the option, its value, and what is allowed.
    """
    try:
        return _CONVERTERS[kind](name, value)
    except OptionError:
        raise
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        raise OptionError(name, f"must be {_NOUNS[kind]}, got {shorten(value)}") from None


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Reads a JSON object that a client sent in the input `name`.

    Raises:
        OptionError: it isn't JSON, not an object, or holds too much.
    """
    if not isinstance(text, str):
        raise OptionError(name, f"must be a string of JSON, got {shorten(text)}")
    check_json(name, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(name, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise OptionError(name, f"must be a JSON object, got {shorten(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half of a surrogate pair is no text
    return value


def _boolean(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    if not isinstance(value, (str, int, float)):
        raise TypeError
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    return float(value)


def _list(name: str, value: Any) -> list[Any]:
    """A list, or one in JSON, or a single value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        check_json(name, value)
        value = json.loads(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # a stop string may well begin with a bracket
        return (_text(name, value),)
    return tuple(_text(name, item) for item in _list(name, value))


def _object(name: str, value: Any) -> dict[Any, Any]:
    if isinstance(value, str):
        value = parse_json(name, value)
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


def _biases(name: str, value: Any) -> dict[int, float]:
    biases = _object(name, value)
    if len(biases) > _MAX_BIASES:
        raise OptionError(name, f"may hold at most {_MAX_BIASES} elements, got {len(biases)}")
    return {_integer(name, token_id): _number(name, bias) for token_id, bias in biases.items()}


_CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "any": lambda name, value: value,
    "str": _text,
    "bool": _boolean,
    "int": _integer,
    "float": _number,
    "strings": _strings,
    # In which an empty one asks for nothing.
    "texts": lambda name, value: tuple(text for text in _strings(name, value) if text),
    "ints": lambda name, value: tuple(_integer(name, item) for item in _list(name, value)),
    "floats": lambda name, value: tuple(_number(name, item) for item in _list(name, value)),
    "biases": _biases,
    "object": _object,
    "objects": lambda name, value: tuple(_object(name, item) for item in _list(name, value)),
}
