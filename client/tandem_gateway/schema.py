"""What clients of the OpenAI API send, and the same in Tandem's terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tandem_client import Options, Prompt

# Of a list of wrong values one is enough to say so.
_T = TypeVar("_T")
Values = Annotated[list[_T], Field(fail_fast=True)]
# "As many as there is room for": the server ends a sequence at its max_model_len.
_NO_LIMIT = 2**31 - 1


# As many as there may be, with an error for each.
_MAX_BIASES = 4096


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > _MAX_BIASES:
        raise ValueError(f"at most {_MAX_BIASES} tokens")
    return biases


class StreamOptions(BaseModel):
    """What comes with a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class JSONSchema(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(extra="ignore")

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class Request(BaseModel, ABC):
    """What both kinds of request have in common, with the extensions of vLLM and Tandem."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = None
    stop: str | Values[str] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    response_format: ResponseFormat | None = None

    # Sent in `extra_body`.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    bad_words: Values[str] | None = None
    stop_token_ids: Values[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    cache_salt: str | None = None

    # Requests with the same key go to the same server.
    prompt_cache_key: str | None = None

    # Taken, without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None

    def options(self) -> Options:
        """The options that the server knows."""
        names = Options.__optional_keys__ & set(type(self).model_fields)
        given: dict[str, Any] = {name: getattr(self, name) for name in names - {"logprobs"}}
        given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        given["structured_outputs"] = self.structured_outputs or self._guide()
        return cast("Options", {name: v for name, v in given.items() if v is not None})

    def _guide(self) -> dict[str, Any] | None:
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object":
            return {"json_object": True}
        if self.response_format.json_schema is None:
            raise ValueError("response_format.json_schema is missing")
        return {"json": self.response_format.json_schema.schema_}

    @property
    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """The prompts, each of which is answered `n` times."""


class ChatCompletionRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Values[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Values[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def options(self) -> Options:
        """The options that the server knows."""
        options = super().options()
        limits = (self.max_completion_tokens, self.max_tokens, _NO_LIMIT)
        options["max_tokens"] = next(limit for limit in limits if limit is not None)
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        if self.tool_choice == "none":
            options.pop("tools", None)
        return options

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation; parts of text in a message are joined, as templates want them."""
        return [
            [{**message, "content": _text(message.get("content"))} for message in self.messages]
        ]


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: str | Values[str] | Values[int] | Values[Values[int]]
    max_tokens: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: None = None

    def options(self) -> Options:
        """The options that the server knows."""
        options = super().options()
        if self.max_tokens is not None:
            options["max_tokens"] = self.max_tokens
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        if self.echo:
            options["exclude_input_in_output"] = False
        return options

    @property
    def prompts(self) -> list[Prompt]:
        """One or several."""
        if not self.prompt:
            raise ValueError("prompt: give at least one token")
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [cast("Prompt", self.prompt)]
        return cast("list[Prompt]", list(self.prompt))


def _text(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict)]
    if len(parts) < len(content) or any(part.get("type") != "text" for part in parts):
        raise ValueError("messages: this server takes parts of type 'text' only")
    return "".join(str(part.get("text", "")) for part in parts)
