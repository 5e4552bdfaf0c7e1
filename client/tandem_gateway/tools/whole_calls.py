"""Calls in notations other than JSON, which are read once they are whole."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tandem_gateway.tools.source import Nesting, Piece, Source, Steps

# What a function's parameters are, by its name.
Schemas = Mapping[str, Mapping[str, Any]]
Call = tuple[str, dict[str, Any]]
Parse = Callable[[str, Schemas], Iterator[Call]]
_BARE_KEY = re.compile(r'([{,]\s*)([^\s"{}\[\],:]+)\s*:')


def read_whole(source: Source, schemas: Schemas, parse: Parse, end: str) -> Steps[bool]:
    """Reads what is before the mark `end`; whether it is calls. If not, nothing is read."""
    while (place := source.ahead.find(end)) < 0 and not source.has_ended:
        yield None
    calls = [] if place < 0 else _parse(parse, source.ahead[:place], schemas)
    if not calls:
        source.go_back()
        return False
    source.move(place + len(end))
    source.accept()
    for name, arguments in calls:
        yield Piece("name", name)
        yield Piece("arguments", arguments)
    return True


def read_list(source: Source, schemas: Schemas, end: str) -> Steps[bool]:
    """Reads calls as Python writes them, `[f(a=1), g()]`; whether it is calls."""
    yield from source.skip("")
    nesting = Nesting("\"'")
    while (place := nesting.find_end(source.ahead)) is None and not source.has_ended:
        yield None
    calls = [] if place is None else _parse(parse_python, source.ahead[:place], schemas)
    if place is None or not calls:
        source.go_back()
        return False
    source.move(place)
    source.accept()
    for name, arguments in calls:
        yield Piece("name", name)
        yield Piece("arguments", arguments)
    yield from source.skip("")
    if end and (yield from source.meets(end)):
        source.accept()
    source.go_back()
    return True


def _parse(parse: Parse, text: str, schemas: Schemas) -> list[tuple[str, str]]:
    """The calls, with arguments as JSON; none if one of them is broken or of no known function."""
    try:
        calls = [
            (name, json.dumps(arguments, ensure_ascii=False))
            for name, arguments in parse(text, schemas)
        ]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []
    return calls if all(name in schemas for name, _ in calls) else []


def parse_gemma(text: str, schemas: Schemas) -> Iterator[Call]:
    """Gemma 4's `call:f{city:<|"|>Paris<|"|>,days:[1,2]}`."""
    match = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(text)
    parts = match[2].split('<|"|>')
    parts[::2] = [_BARE_KEY.sub(r'\1"\2":', part) for part in parts[::2]]
    parts[1::2] = [json.dumps(part) for part in parts[1::2]]
    yield match[1], json.loads("".join(parts))


def parse_xml(text: str, schemas: Schemas) -> Iterator[Call]:
    """Qwen3-Coder's `<function=f>` with a `<parameter=name>` for each argument.

    Values are JSON, but for those that the function's schema calls strings.
    """
    function = re.fullmatch(r"\s*<function=([^>\s]+)>(.*)</function>\s*", text, re.DOTALL)
    if function is None:
        raise ValueError(text)
    name, body = function.groups()
    parameters = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
    if body.count("<parameter=") != len(parameters):
        raise ValueError(text)
    properties = schemas.get(name, {}).get("properties") or {}
    yield name, {key: _value(value, properties.get(key)) for key, value in parameters}


def _value(text: str, schema: Any) -> Any:
    if "string" in (_types(schema) or ["string"]):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _types(schema: Any) -> list[Any]:
    """The types that a schema lets a value have; none if it doesn't say."""
    if not isinstance(schema, dict):
        return []
    named = schema.get("type", [])
    choices = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return [
        *(named if isinstance(named, list) else [named]),
        *(kind for choice in choices for kind in _types(choice)),
    ]


def parse_python(text: str, schemas: Schemas) -> Iterator[Call]:
    """A list of calls with named arguments, all of them literals."""
    calls = ast.parse(text.strip(), mode="eval").body
    if not isinstance(calls, ast.List):
        raise TypeError(text)
    for call in calls.elts:
        if not isinstance(call, ast.Call) or call.args:
            raise TypeError(text)
        arguments = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise TypeError(text)
            arguments[keyword.arg] = _literal(keyword.value)
        yield ast.unparse(call.func), arguments


def _literal(node: ast.expr) -> Any:
    """Python's literals, and JSON's own three names."""
    if isinstance(node, ast.Name):
        return json.loads(node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(node)
