"""Messages as clients send them back, made into what chat templates know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tandem_gateway.errors import shorten
from tandem_options import OptionError, parse_json

# Parts of a message that are text, and where it is in them.
_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# What a model thought before; templates leave it out.
_LEFT_OUT = ("thinking", "reasoning")


def for_template(messages: Iterable[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """The messages with text for content, and arguments as objects.

    Args:
        template: the model's chat template; of a role that it doesn't know the nearest is taken.

    Raises:
        OptionError: a message has parts that are no text, or calls that can't be read.
    """
    return [_message(message, f"messages.{n}", template) for n, message in enumerate(messages)]


def _message(message: dict[str, Any], place: str, template: str) -> dict[str, Any]:
    made = {name: value for name, value in message.items() if value is not None}
    made["content"] = _text(message.get("content"), place)
    if made.get("role") == "developer" and "developer" not in template:
        made["role"] = "system"
    if made.get("role") == "function":
        made["role"] = "tool"
    # OpenAI's older way of one call in a message.
    if call := made.pop("function_call", None):
        made["tool_calls"] = [{"type": "function", "function": call}]
    calls = made.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise OptionError(f"{place}.tool_calls", f"must be a list, got {shorten(repr(calls))}")
    if calls:
        made["tool_calls"] = [_call(each, f"{place}.tool_calls") for each in calls]
    return made


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise OptionError(place, f"must hold calls of functions, got {shorten(repr(call))}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(f"{place}.arguments", arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def _text(content: Any, place: str) -> str:
    """Text as it is; parts of it are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _LEFT_OUT:
            continue
        text = part.get(_TEXTS[kind], "") if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str):
            raise OptionError(place, f"must have parts of text only, got {shorten(repr(kind))}")
        texts.append(text)
    return "".join(texts)
