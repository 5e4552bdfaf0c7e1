"""Calls written as JSON objects, whose arguments are handed on while they come."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from tandem_gateway.tools.source import Nesting, Piece, Source, Steps

# Up to where the arguments begin, in the order in which models write it.
_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# Mistral's newer way: `name[ARGS]{...}`, or without the mark.
_NAME = re.compile(r"(?P<name>[\w.-]+)(?:\[ARGS\])?\s*(?=\{)")
_PART_OF_NAME = re.compile(r"[\w.-]+(?:\[A?R?G?S?\]?)?\s*")


def read_objects(
    source: Source, names: Collection[str], *, begin: str = "", between: str = "", end: str = ""
) -> Steps[bool]:
    """Reads objects like `{"name": ..., "arguments": {...}}`; whether there was one.

    A call counts from where its arguments begin: from there on it is one, whatever follows. If the
    first is no call, nothing is read.

    Args:
        names: the functions that there are; others can't be called.
        begin, between: characters before the first object, and after each.
        end: the mark after them.
    """
    found = False
    while True:
        yield from source.skip(between if found else begin)
        if source.ahead.startswith("{"):
            is_call = yield from _read_object(source, names)
        else:
            is_call = yield from _read_named(source, names)
        if not is_call:
            break
        found = True
    if found and (yield from source.meets(end)):
        source.accept()
    source.go_back()
    return found


def _read_object(source: Source, names: Collection[str]) -> Steps[bool]:
    nesting = Nesting()
    while True:
        text = source.ahead
        if (head := _HEAD.match(text)) and head["name"] in names:
            yield from _read_arguments(source, head)
            yield from _read_rest(source)
            return True
        if end := nesting.find_end(text):
            break
        if source.has_ended:
            return False
        yield None
    call = _call(text[:end], names)
    if call is None:
        return False
    source.move(end)
    source.accept()
    yield Piece("name", call[0])
    yield Piece("arguments", call[1])
    return True


def _read_named(source: Source, names: Collection[str]) -> Steps[bool]:
    while not (head := _NAME.match(source.ahead)):
        if source.has_ended or not _PART_OF_NAME.fullmatch(source.ahead):
            return False
        yield None
    if head["name"] not in names:
        return False
    yield from _read_arguments(source, head)
    return True


def _read_arguments(source: Source, head: re.Match[str]) -> Steps[None]:
    source.move(head.end())
    source.accept()
    yield Piece("name", head["name"])
    nesting, end = Nesting(), None
    while end is None:
        end = nesting.find_end(source.text)
        if piece := source.take(nesting.place):
            yield Piece("arguments", piece)
        nesting.place = 0
        if end is None:
            if source.has_ended:
                return
            yield None


def _read_rest(source: Source) -> Steps[None]:
    """What is in an object after its arguments."""
    nesting = Nesting(depth=1)
    while (end := nesting.find_end(source.text)) is None and not source.has_ended:
        yield None
    source.take(len(source.text) if end is None else end)


def _call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """A whole object as a call: of those whose keys come in another order."""
    try:
        value = json.loads(text)
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    name = value.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
