"""What clients of `/v1/responses` send, and the same as a chat completion."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem_gateway.errors import shorten
from tandem_gateway.schema import ChatCompletionRequest, Values
from tandem_options import OptionError

_TEXT_PARTS = {"input_text", "output_text", "text"}
_LOGPROBS = "message.output_text.logprobs"


class TextFormat(BaseModel):
    """What the text must be; a schema has a name."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(BaseModel):
    """How the text is written."""

    model_config = ConfigDict(extra="ignore")

    format: TextFormat | None = None


class Reasoning(BaseModel):
    """How much the model thinks."""

    model_config = ConfigDict(extra="ignore")

    effort: str | None = None


class ResponsesRequest(BaseModel):
    """`POST /v1/responses`. What isn't a field here is passed on as in a chat completion."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | Values[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: Values[str] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Values[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    # Taken, without effect: nothing is stored.
    store: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    truncation: Literal["disabled", "auto"] | None = None

    # Refused.
    background: bool | None = None
    conversation: Any = None
    previous_response_id: Any = None
    prompt: Any = None

    def other(self, name: str) -> Any:
        """A field that is passed on; None if it isn't given."""
        return (self.model_extra or {}).get(name)

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat completion.

        Raises:
            OptionError: naming what a chat completion can't hold.
            ValidationError: naming what it holds, but with other values.
        """
        for name in ("background", "conversation", "previous_response_id", "prompt"):
            if getattr(self, name):
                raise OptionError(
                    name, "must not be given: nothing is stored here, send all of it in input"
                )
        own: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self._response_format(),
            "tools": [_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        if _LOGPROBS in (self.include or ()) or self.top_logprobs:
            own |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        given = {name: value for name, value in own.items() if value is not None}
        request = ChatCompletionRequest(**{**(self.model_extra or {}), **given})
        if request.num_answers != 1:
            got = request.num_answers
            raise OptionError("n", f"must be 1, got {got}: a response has one answer")
        return request

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for number, item in enumerate(self.input):
            kind = item.get("type") or "message"
            read = _ITEMS.get(kind) if isinstance(kind, str) else None
            if read is None:
                got = shorten(repr(kind))
                raise OptionError(f"input.{number}", f"must be one of {_known()}, got {got}")
            message = read(item, f"input.{number}")
            if message is not None:
                _add(messages, message)
        return messages

    def _response_format(self) -> dict[str, Any] | None:
        given = self.text.format if self.text else None
        if given is None:
            return None
        if given.type != "json_schema":
            return {"type": given.type}
        if given.schema_ is None:
            raise OptionError("text.format.schema", "is missing")
        schema = {"name": given.name or "answer", "schema": given.schema_}
        return {"type": "json_schema", "json_schema": schema}

    def _tool_choice(self) -> str | dict[str, Any] | None:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") != "function":
            raise OptionError(
                "tool_choice",
                f"must be of type 'function', got {shorten(repr(choice.get('type')))}",
            )
        return {"type": "function", "function": {"name": choice.get("name")}}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        got = shorten(repr(tool.get("type")))
        raise OptionError("tools", f"must be of type 'function', got {got}")
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    return {"role": item.get("role"), "content": _text(item.get("content"), place)}


def _call(item: dict[str, Any], _: str) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _result(item: dict[str, Any], place: str) -> dict[str, Any]:
    content = _text(item.get("output"), place)
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}


def _nothing(_: dict[str, Any], __: str) -> None:
    """What a model thought in earlier turns; templates leave it out."""


_ITEMS: dict[str, Any] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _result,
    "reasoning": _nothing,
}


def _known() -> str:
    return ", ".join(_ITEMS)


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(kind, str):
            raise OptionError(place, f"must be text only, got {shorten(repr(kind))}")
        if kind == "refusal":
            texts.append(str(part.get("refusal", "")))
        elif kind in _TEXT_PARTS:
            texts.append(str(part.get("text", "")))
        else:
            raise OptionError(place, f"must be text only, got {shorten(repr(kind))}")
    return "".join(texts)


def _add(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """A call belongs to the assistant's message before it, where there is one."""
    last = messages[-1] if messages else {}
    if "tool_calls" in message and last.get("role") == "assistant":
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    else:
        messages.append(message)
