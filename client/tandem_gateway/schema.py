"""What clients of the OpenAI API send, and the same in Tandem's terms."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tandem_client import Options, Prompt
from tandem_gateway.errors import shorten
from tandem_options import OptionError, Reading, read

# Of a list of wrong values one is enough to say so.
_T = TypeVar("_T")
Values = Annotated[list[_T], Field(fail_fast=True)]
# "As many as there is room for": the server ends a sequence at its max_model_len.
_NO_LIMIT = 2**31 - 1
_MAX_ANSWERS = 64
_MAX_TOKEN_ID = 2**31
_SMALLEST_NUCLEUS = 1e-6
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class _Body(BaseModel):
    """An object in which null means that a field isn't given."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}


class StreamOptions(_Body):
    """What comes with a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JSONSchema(_Body):
    """A schema with a name."""

    model_config = ConfigDict(extra="ignore")

    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(_Body):
    """What the text must be."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JSONSchema | None = None


class FunctionName(BaseModel):
    """A function that has to be called."""

    name: str


class NamedTool(BaseModel):
    """A tool that has to be used."""

    type: Literal["function"] = "function"
    function: FunctionName


class Request(_Body, ABC):
    """What both kinds of request have in common.

    All that isn't a field here is an option, of the table that Triton's door has too.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_ANSWERS)] = 1
    response_format: ResponseFormat | None = None
    # Requests with the same key go to the same server.
    prompt_cache_key: str | None = None

    @cached_property
    def reading(self) -> Reading:
        """The options, and names that there are no options of.

        Raises:
            OptionError: a value can't be read, or asks for what can't be done.
        """
        sent = dict(self.model_extra or {})
        if "n" in self.model_fields_set:
            sent["n"] = self.n
        # Of OpenAI's two names the newer one wins.
        newer = {name: sent[name] for name in ("max_completion_tokens",) if name in sent}
        reading = read(newer, sent)
        # A nucleus of nothing but the likeliest token is OpenAI's 0; at Triton's door that is
        # TensorRT-LLM's, and means that it isn't given.
        if "top_p" not in reading.values and "top_p" in sent:
            reading.values["top_p"] = _SMALLEST_NUCLEUS
        return reading

    @property
    def num_answers(self) -> int:
        """To each prompt.

        Raises:
            OptionError: too many, or none.
        """
        number: int = self.reading.values.get("n", 1)
        if not 1 <= number <= _MAX_ANSWERS:
            raise OptionError("n", f"must be from 1 to {_MAX_ANSWERS}, got {number}")
        return number

    def options(self) -> Options:
        """The options that the server knows.

        Raises:
            OptionError: see `reading`.
        """
        values: dict[str, Any] = {**self.reading.values}
        values.pop("n", None)  # which the gateway sets itself
        if not _REQUEST_ID.fullmatch(values.get("request_id", "-")):
            raise OptionError(
                "request_id",
                "must have from 1 to 128 letters, digits or any of ._:-, got "
                + shorten(repr(values["request_id"])),
            )
        if self.response_format is not None:
            values["response_format"] = self.response_format.model_dump(
                by_alias=True, exclude_none=True
            )
        if self.prompt_cache_key is not None:
            values["prompt_cache_key"] = self.prompt_cache_key
        return cast("Options", values)

    @property
    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """The prompts, each of which is answered `n` times.

        Raises:
            OptionError: there are none, or none that can be read.
        """


class ChatCompletionRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Values[dict[str, Any]]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Values[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # OpenAI's older names.
    functions: Values[dict[str, Any]] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None

    @model_validator(mode="after")
    def _with_tools(self) -> Self:
        if self.functions and not self.tools:
            self.tools = [{"type": "function", "function": each} for each in self.functions]
        if self.tool_choice is None:
            call = self.function_call
            self.tool_choice = NamedTool(function=call) if isinstance(call, FunctionName) else call
        return self

    def options(self) -> Options:
        """The options that the server knows."""
        options = super().options()
        options.setdefault("max_tokens", _NO_LIMIT)
        if not options.get("exclude_input_in_output", True):
            raise OptionError("echo", "must be False with messages, got True: they are no text")
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise OptionError(
                "top_logprobs",
                f"must come with logprobs: true, got {self.top_logprobs} without it",
            )
        if self.tools and self.tool_choice != "none":
            options["tools"] = self.tools
        return options

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends with the beginning of an answer."""
        values = self.reading.values
        goes_on = values.get("continue_final_message", False)
        return bool(values.get("add_generation_prompt", not goes_on))

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation."""
        if not self.messages:
            raise OptionError("messages", "must hold at least one message, got []")
        return [self.messages]


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: str | Values[str] | Values[int] | Values[Values[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def options(self) -> Options:
        """The options that the server knows."""
        options = super().options()
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if not options.get("exclude_input_in_output", True):
                asked = options.get("prompt_logprobs", 0)
                options["prompt_logprobs"] = max(asked, self.logprobs)
        return options

    @property
    def prompts(self) -> list[Prompt]:
        """One or several."""
        if isinstance(self.prompt, str):
            prompts: list[Any] = [self.prompt]
        elif self.prompt and isinstance(self.prompt[0], int):
            prompts = [self.prompt]
        else:
            prompts = list(self.prompt)
        for prompt in prompts:
            _check_prompt(prompt)
        if not prompts:
            raise OptionError("prompt", "must hold at least one text or token, got []")
        return cast("list[Prompt]", prompts)


def _check_prompt(prompt: str | list[int]) -> None:
    if not prompt:
        raise OptionError("prompt", f"must hold at least one token, got {prompt!r}")
    if isinstance(prompt, str):
        return
    for token_id in prompt:
        if not 0 <= token_id < _MAX_TOKEN_ID:
            raise OptionError(
                "prompt",
                f"must hold token ids from 0 to {_MAX_TOKEN_ID - 1}, got {shorten(repr(token_id))}",
            )
