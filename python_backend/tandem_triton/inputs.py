"""A request's prompt, in any of the ways in which it can be given."""

from __future__ import annotations

import json
from inspect import signature
from typing import Any, NamedTuple

from tandem import InvalidRequestError
from tandem.errors import shorten
from tandem.requests.end_of_turn import REFUSALS
from tandem.requests.limits import TextLimits
from tandem.requests.options import PromptOptions

PROMPT_INPUTS = ("text_input", "input_ids", "messages")


class Prompt(NamedTuple):
    """What is to be continued: text, or token ids, which may be those of a conversation."""

    content: str | list[int]
    is_chat: bool = False


def read_prompt(request: Any, tokenizer: Any, limits: TextLimits, options: PromptOptions) -> Prompt:
    """The prompt, as text if it was given as text and else as token ids.

    Args:
        limits: bounds what is parsed and rendered.
        options: how the prompt is to be read.

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
        return Prompt(_kept(read_ids(tensors["input_ids"]), limits, options))
    value = read_tensor(tensors[given[0]])
    if not isinstance(value, str):
        raise InvalidRequestError(f"{given[0]} must hold one string, got {len(value)} elements")
    if given == ["text_input"]:
        if options.add_special_tokens is not False and options.truncate_prompt_tokens is None:
            return Prompt(value)
        limits.check_text("the prompt", value)
        is_added = options.add_special_tokens is not False
        token_ids = tokenizer(value, add_special_tokens=is_added)["input_ids"]
        return Prompt(_kept(token_ids, limits, options))
    tools = read_tensor(tensors["tools"]) if "tools" in tensors else "null"
    limits.check_json("messages", value)
    limits.check_json("tools", tools)
    messages = _json("messages", value)
    limits.check_count("messages", len(messages) if isinstance(messages, list) else 0)
    token_ids = render(messages, _json("tools", tools) or None, tokenizer, options)
    return Prompt(_kept(token_ids, limits, options), is_chat=True)


def _kept(token_ids: list[int], limits: TextLimits, options: PromptOptions) -> list[int]:
    """The last ones, if the prompt is to be truncated."""
    number = options.truncate_prompt_tokens
    if number is None:
        return token_ids
    return token_ids[-(limits.max_model_len - 1 if number == -1 else number) :]


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


def render(messages: Any, tools: Any, tokenizer: Any, options: PromptOptions) -> list[int]:
    """A conversation as token ids, by the model's chat template.

    It ends where an answer begins, unless the options ask for something else.

    Raises:
        InvalidRequestError: there is no template, or it can't make anything of the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError(
            "messages can't be used: this model has no chat template; send text_input instead"
        )
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            for message in messages
        )
    ):
        raise InvalidRequestError(
            "messages must be a list of one or more objects with role and content, got "
            + shorten(messages)
        )
    told = _told(options, tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, **_ending(options), **told
        )
        text.encode()  # half of a surrogate pair is no text
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"messages are not valid UTF-8: {error}") from error
    except REFUSALS as error:
        raise InvalidRequestError(
            f"the chat template refuses these messages: {str(error)[:200]}"
        ) from error
    # Templates write the special tokens themselves.
    is_added = bool(options.add_special_tokens)
    token_ids: list[int] = tokenizer(text, add_special_tokens=is_added)["input_ids"]
    return token_ids


def _ending(options: PromptOptions) -> dict[str, bool]:
    goes_on, begins = options.continue_final_message, options.add_generation_prompt
    return {
        "continue_final_message": goes_on,
        "add_generation_prompt": not goes_on if begins is None else begins,
    }


def _told(options: PromptOptions, tokenizer: Any) -> dict[str, Any]:
    """What the template is told beside the messages: its own variables, nothing of the call."""
    told = {str(name): value for name, value in options.chat_template_kwargs.items()}
    if options.reasoning_effort is not None:
        told.setdefault("reasoning_effort", options.reasoning_effort)
    taken = set(signature(tokenizer.apply_chat_template).parameters) | {"messages"}
    if wrong := sorted(taken & set(told)):
        raise InvalidRequestError(
            f"chat_template_kwargs can't set {wrong[0]}: only what the chat template itself reads"
        )
    return told


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
