"""The notations in which models call tools and think, and which one a model uses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tandem_gateway.tools.json_calls import read_objects
from tandem_gateway.tools.source import Source, Steps
from tandem_gateway.tools.whole_calls import (
    Schemas,
    parse_gemma,
    parse_xml,
    read_list,
    read_whole,
)


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written that can be held to a schema: as JSON, without a special token.

    Attributes:
        arguments: their key, behind that of the name.
        begin, end: the marks around each call; empty where calls are all of the text.
        between: what parts calls.
    """

    arguments: str
    begin: str = ""
    end: str = ""
    between: str = ""


@dataclass(frozen=True)
class ToolFormat:
    """How a model calls tools.

    Attributes:
        sign: what the chat template of such a model holds, as an expression.
        read: reads calls after a mark; whether there were some.
        marks: what begins calls, anywhere in the text.
        bare: with what calls begin at the start of a text that has no mark.
        has_special_marks: whether they are special tokens, which a text doesn't show by default.
        hidden: marks to be left out of the text, should they show.
        syntax: for `strict` functions; None if they can't be held to their schemas.
    """

    sign: str
    read: Callable[[Source, Schemas], Steps[bool]]
    marks: tuple[str, ...] = ()
    bare: str = ""
    has_special_marks: bool = False
    hidden: tuple[str, ...] = ()
    syntax: CallSyntax | None = None


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model thinks before it answers: between two marks."""

    sign: str
    begin: str
    end: str
    has_special_marks: bool = False


# By name. Of those whose sign is in a template the first is its model's.
TOOL_FORMATS = {
    "gemma4": ToolFormat(
        sign=r"<\|tool_call>",
        read=lambda source, tools: read_whole(source, tools, parse_gemma, "<tool_call|>"),
        marks=("<|tool_call>",),
        has_special_marks=True,
        hidden=("<|tool_response>", "<turn|>"),
    ),
    "qwen3_coder": ToolFormat(
        sign=r"<tool_call>[^`]*<function=",
        read=lambda source, tools: read_whole(source, tools, parse_xml, "</tool_call>"),
        marks=("<tool_call>",),
    ),
    "hermes": ToolFormat(
        sign=r"<tool_call>",
        read=lambda source, tools: read_objects(source, tools, end="</tool_call>"),
        marks=("<tool_call>",),
        syntax=CallSyntax("arguments", begin="<tool_call>", end="</tool_call>"),
    ),
    "mistral": ToolFormat(
        sign=r"\[TOOL_CALLS\]",
        read=lambda source, tools: read_objects(source, tools, begin="[", between=",]"),
        marks=("[TOOL_CALLS]",),
        has_special_marks=True,
        hidden=("</s>",),
    ),
    "pythonic": ToolFormat(
        sign=r"<\|python_start\|>|\[func_name1\(",
        read=lambda source, tools: read_list(source, tools, "<|python_end|>"),
        marks=("<|python_start|>",),
        bare="[",
        has_special_marks=True,
        hidden=("<|eot|>", "<|eom|>", "<|eot_id|>", "<|eom_id|>"),
    ),
    "llama3_json": ToolFormat(
        sign=r'<\|python_tag\|>|"parameters": dictionary',
        read=lambda source, tools: read_objects(source, tools, between=";"),
        marks=("<|python_tag|>",),
        bare="{",
        has_special_marks=True,
        hidden=("<|eot_id|>", "<|eom_id|>"),
        syntax=CallSyntax("parameters", between=";"),
    ),
}
REASONING_FORMATS = {
    "gemma4": ReasoningFormat(r"<\|channel>", "<|channel>thought\n", "<channel|>", True),
    "mistral": ReasoningFormat(r"\[THINK\]", "[THINK]", "[/THINK]", True),
    "think": ReasoningFormat(r"<think>", "<think>", "</think>"),
}


def tool_format_of(template: str) -> ToolFormat | None:
    """The notation that a chat template's model calls tools in, if it is a known one."""
    found = (each for each in TOOL_FORMATS.values() if re.search(each.sign, template))
    return next(found, None)


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The marks that a chat template's model thinks between, if they are known ones."""
    found = (each for each in REASONING_FORMATS.values() if re.search(each.sign, template))
    return next(found, None)
