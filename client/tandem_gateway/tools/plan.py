"""What a chat request makes of its tools: what the model must write, and how that is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem_gateway.errors import shorten
from tandem_gateway.schema import ChatCompletionRequest
from tandem_gateway.tools.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
    reasoning_format_of,
    tool_format_of,
)
from tandem_gateway.tools.grammars import closed, forced_calls, strict_calls
from tandem_gateway.tools.reader import FORCED, AnswerReader
from tandem_gateway.tools.whole_calls import Schemas
from tandem_options import OptionError

NONE = "none"
# Options that say what the text must match.
_GUIDES = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_guide",
)
# Of a function that names no parameters.
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Parsers:
    """The notations to read, where a chat template is not to say.

    Attributes:
        tools, reasoning: names of formats, "none" for none; empty for the template's.
    """

    tools: str = ""
    reasoning: str = ""

    def tool_format(self, template: str) -> ToolFormat | None:
        """That in which the model of a chat template calls tools."""
        if self.tools:
            return TOOL_FORMATS.get(self.tools)
        return tool_format_of(template)

    def reasoning_format(self, template: str) -> ReasoningFormat | None:
        """That in which the model of a chat template thinks."""
        if self.reasoning:
            return REASONING_FORMATS.get(self.reasoning)
        return reasoning_format_of(template)


@dataclass(frozen=True)
class Plan:
    """How the texts of one request's answers are read, and what the server is asked for that.

    Attributes:
        arguments: of `AnswerReader`.
        options: the server's, beside those of the request.
        ignored: fields of the request that can't be honoured.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    def reader(self) -> AnswerReader:
        """A reader for one answer."""
        return AnswerReader(**self.arguments)


def plan_of(request: ChatCompletionRequest, template: str, parsers: Parsers) -> Plan | None:
    """What a request's answers are read as; None if they are text and nothing else.

    Args:
        template: the model's chat template.

    Raises:
        OptionError: there is no such function, or the text would have to match two things.
    """
    schemas = _schemas(request)
    choice = request.tool_choice or "auto"
    one = request.parallel_tool_calls is False
    if schemas and not isinstance(choice, str):
        name = choice.function.name
        if name not in schemas:
            known = ", ".join(schemas)
            raise OptionError("tool_choice", f"must be one of {known}, got {shorten(repr(name))}")
        return Plan({"named": name}, _guide(request, {"json": closed(schemas[name])}))
    if schemas and choice == "required":
        read = {"calls": FORCED, "schemas": schemas}
        return Plan(read, _guide(request, {"grammar": forced_calls(schemas, one=one)}))
    if choice == "required" or not isinstance(choice, str):
        raise OptionError("tool_choice", "needs tools, and there are none")
    calls = parsers.tool_format(template) if schemas and choice == "auto" else None
    guided = bool(_guided_by(request))
    # A text that has to match something holds no thoughts.
    reasoning = None if guided else parsers.reasoning_format(template)
    strict = _strict(request) if choice == "auto" and not guided else []
    if calls is None and reasoning is None and not strict:
        return None
    options: dict[str, Any] = {}
    if _has_special_marks(calls, reasoning):
        options["skip_special_tokens"] = False
    if strict and calls is not None and calls.syntax is not None:
        grammar = strict_calls(calls.syntax, schemas, strict, one=one)
        options["structured_outputs"] = {"grammar": grammar}
        strict = []
    return Plan(
        {
            "calls": calls,
            "schemas": schemas,
            "max_calls": 1 if one else None,
            "reasoning": reasoning,
            "is_thinking": reasoning is not None
            and request.begins_answer
            and _begins_thinking(template, reasoning),
        },
        options,
        ["tools.function.strict"] if strict else [],
    )


def _strict(request: ChatCompletionRequest) -> list[str]:
    """The functions whose arguments have to follow their schemas."""
    functions = [tool["function"] for tool in request.tools or ()]
    return [function["name"] for function in functions if function.get("strict") is True]


def _schemas(request: ChatCompletionRequest) -> Schemas:
    """The parameters of the functions that may be called, by name."""
    found = {}
    for number, tool in enumerate(request.tools or ()):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if tool.get("type", "function") != "function" or not isinstance(name, str) or not name:
            raise OptionError(
                f"tools.{number}",
                "must be of type 'function', with a function that has a name, got "
                + shorten(repr(tool)),
            )
        assert isinstance(function, dict)
        parameters = function.get("parameters") or _NOTHING
        if not isinstance(parameters, dict) or not isinstance(
            parameters.get("properties") or {}, dict
        ):
            raise OptionError(
                f"tools.{number}.function.parameters",
                f"must be a schema of an object, got {shorten(repr(parameters))}",
            )
        found[name] = parameters
    return found


def _guide(request: ChatCompletionRequest, guide: dict[str, Any]) -> dict[str, Any]:
    if name := _guided_by(request):
        raise OptionError(name, "must not be given where tool_choice makes the model call a tool")
    return {"structured_outputs": guide}


def _guided_by(request: ChatCompletionRequest) -> str:
    """The field that says what the text must match, if one does."""
    if request.response_format is not None and request.response_format.type != "text":
        return "response_format"
    return next((name for name in _GUIDES if name in request.reading.values), "")


def _begins_thinking(template: str, reasoning: ReasoningFormat) -> bool:
    """Whether the beginning of an answer, as the template writes it, holds the first mark alone."""
    _, found, beginning = template.rpartition("add_generation_prompt")
    mark = reasoning.begin.strip()
    return bool(found) and mark in beginning and reasoning.end not in beginning


def _has_special_marks(calls: ToolFormat | None, reasoning: ReasoningFormat | None) -> bool:
    return any(each is not None and each.has_special_marks for each in (calls, reasoning))
