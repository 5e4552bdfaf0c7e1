"""Grammars that the text of an answer has to match, made of the tools that it may call."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from tandem_gateway.tools.formats import CallSyntax
from tandem_gateway.tools.whole_calls import Schemas

# As models write JSON, with nothing left to choose.
_STYLE = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def forced_calls(schemas: Schemas, *, one: bool) -> str:
    """A list of calls and nothing else, as `FORCED` reads them.

    Args:
        one: whether there may be one call alone.
    """
    more = "" if one else ' (", " call)*'
    return "\n".join([f'start: "[" call{more} "]"', *_calls(schemas, schemas, "arguments")])


def strict_calls(
    syntax: CallSyntax, schemas: Schemas, strict: Collection[str], *, one: bool
) -> str:
    """Any text, in which calls are as they should be.

    Args:
        strict: the functions whose schemas hold; arguments of others are any object.
        one: see `forced_calls`.
    """
    rules = [*_calls(schemas, strict, syntax.arguments), r"SPACE: /[ \n]{0,2}/"]
    if not syntax.begin:
        more = "" if one else f" ({json.dumps(syntax.between)} SPACE call)*"
        return "\n".join(
            [
                f"start: SPACE call{more} SPACE | TEXT",
                # What begins otherwise than a call does.
                r"TEXT: /(\s*[^\s{](.|\n)*)?/",
                *rules,
            ]
        )
    return "\n".join(
        [
            f"start: marked{'?' if one else '*'} TEXT",
            f"marked: begun SPACE call SPACE {json.dumps(syntax.end)}",
            f"begun[lazy]: TEXT {json.dumps(syntax.begin)}",
            r"TEXT: /(.|\n)*/",
            *rules,
        ]
    )


def _calls(schemas: Schemas, strict: Collection[str], arguments: str) -> list[str]:
    """Rules for one call; each schema may refer to parts of itself."""
    rules = ["call: " + " | ".join(f"call{number}" for number in range(len(schemas)))]
    for number, (name, schema) in enumerate(schemas.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{arguments}": ')
        held = closed(schema) if name in strict else {"type": "object"}
        rules += [f'call{number}: {head} arguments{number} "}}"']
        rules += [f"arguments{number}: %json {json.dumps(held | {'x-guidance': _STYLE})}"]
    return rules


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without parameters that it doesn't name: a function would not know them.

    Where several schemas hold together, each names but a part, so they are left as they are.
    """
    return dict(schema) if _combines(schema) else _close(dict(schema))


def _combines(schema: Any) -> bool:
    parts = schema.values() if isinstance(schema, Mapping) else schema
    if isinstance(schema, Mapping) and "allOf" in schema:
        return True
    return isinstance(schema, (Mapping, list)) and any(map(_combines, parts))


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(parts := schema.get(name), dict):
            closed[name] = {key: _close(part) for key, part in parts.items()}
    if "items" in schema:
        closed["items"] = _close(schema["items"])
    if "properties" in schema:
        return {"additionalProperties": False} | closed
    for name in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(name), list):
            closed[name] = [_close(part) for part in parts]
    return closed
