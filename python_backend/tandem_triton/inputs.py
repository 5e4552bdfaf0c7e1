"""A request's prompt, in any of the ways in which it can be given."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError

from tandem import InvalidRequestError
from tandem.errors import shorten
from tandem.requests.limits import TextLimits

PROMPT_INPUTS = ("text_input", "input_ids", "messages")


def read_prompt(
    request: Any, tokenizer: Any, limits: TextLimits, *, add_generation_prompt: bool = True
) -> str | list[int]:
    """The prompt, as text if it was given as text and else as token ids.

    Args:
        limits: bounds what is parsed and rendered.
        add_generation_prompt: whether a conversation ends where the answer begins.

    Raises:
        InvalidRequestError: naming the input, or all of them if there isn't exactly one.
    """
    tensors = {tensor.name(): tensor for tensor in request.inputs()}
    given = [name for name in PROMPT_INPUTS if name in tensors]
    if len(given) != 1:
        raise InvalidRequestError(
            f"a request needs exactly one of {', '.join(PROMPT_INPUTS)}, got "
            + (" and ".join(given) or "none")
        )
    if given == ["input_ids"]:
        return read_ids(tensors["input_ids"])
    value = read_tensor(tensors[given[0]])
    if not isinstance(value, str):
        raise InvalidRequestError(f"{given[0]} must hold one string, got {len(value)} elements")
    if given == ["text_input"]:
        return value
    tools = read_tensor(tensors["tools"]) if "tools" in tensors else "null"
    limits.check_json("messages", value)
    limits.check_json("tools", tools)
    messages = _json("messages", value)
    limits.check_count("messages", len(messages) if isinstance(messages, list) else 0)
    return render(
        messages,
        _json("tools", tools),
        tokenizer,
        add_generation_prompt=add_generation_prompt,
    )


def read_ids(tensor: Any) -> list[int]:
    """The token ids in `input_ids`.

    Raises:
        InvalidRequestError: there are several prompts.
    """
    ids = tensor.as_numpy()
    if ids.ndim > 1 and ids.shape[0] != 1:
        raise InvalidRequestError(
            f"input_ids has the shape {list(ids.shape)}: send each prompt as a request of its own"
        )
    token_ids: list[int] = ids.reshape(-1).tolist()
    return token_ids


def render(
    messages: Any, tools: Any, tokenizer: Any, *, add_generation_prompt: bool = True
) -> list[int]:
    """A conversation as token ids, by the model's chat template.

    Args:
        messages: the conversation.
        tools: what the template may show of functions.
        tokenizer: the model's.
        add_generation_prompt: whether it ends where the answer begins.

    Raises:
        InvalidRequestError: there is no template, or it can't make anything of the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError(
            "messages can't be used: this model has no chat template; send text_input instead"
        )
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise InvalidRequestError(
            "messages must be a list of objects with role and content, got " + shorten(messages)
        )
    try:
        token_ids: list[int] = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequestError(
            f"the chat template refuses these messages: {str(error)[:200]}"
        ) from error
    return token_ids


def read_tensor(tensor: Any) -> Any:
    """The element of an input tensor, or the list of them; strings are decoded."""
    values = tensor.as_numpy().reshape(-1).tolist()
    try:
        values = [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{tensor.name()} is not valid UTF-8: {error}") from error
    return values if len(values) != 1 else values[0]


def _json(name: str, text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}") from error
