"""Questions to a model that ask for no text: what it is, and how it tokenizes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from tritonclient.grpc import InferResult

from tandem_client.options import Prompt
from tandem_client.protocol import Exchange, make_request

_PARAMETER = "tandem_query"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Description:
    """What a model is.

    Attributes:
        chat_template: a Jinja template; None for a model without one.
        max_model_len: tokens of prompt and answer at most.
        vocab_size: of the verifier's outputs.
        dtype: such as "bfloat16".
        eos_token_ids: what ends a text, or a turn.
        eos_tokens: the same as they stand in the vocabulary.
        drafters: the names that requests may give, with the most draft tokens a step.
        default_drafter: of requests that name none.
    """

    chat_template: str | None
    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: Sequence[int]
    eos_tokens: Sequence[str]
    drafters: Mapping[str, int]
    default_drafter: str


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens; `texts`, as they stand in the vocabulary, on request."""

    ids: Sequence[int]
    texts: Sequence[str] | None = None


class TokensOptions(TypedDict, total=False):
    """How to tokenize.

    `add_special_tokens` is true for text, and false for conversations, whose template writes them.
    `add_generation_prompt` (true unless the last message goes on), `continue_final_message`,
    `chat_template_kwargs`, `reasoning_effort` and `tools` are for conversations.
    `return_token_strs` asks for `Tokens.texts`.
    """

    add_special_tokens: bool
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any]
    reasoning_effort: str
    tools: Sequence[Mapping[str, Any]]
    return_token_strs: bool


def describe(url: str, model: str) -> Exchange[Description]:
    """Asks what a model is."""
    # Triton wants an input, whatever it is.
    request = make_request(model, "", stream=False, options={})
    return _exchange(url, request, "describe", _description)


def tokenize(url: str, model: str, prompt: Prompt, options: TokensOptions) -> Exchange[Tokens]:
    """Asks for a prompt's tokens.

    Raises:
        RequestError: the prompt has characters that UTF-8 can't hold.
    """
    request = make_request(model, prompt, stream=False, options=options)
    return _exchange(url, request, "tokenize", _tokens)


def detokenize(url: str, model: str, token_ids: Sequence[int]) -> Exchange[str]:
    """Asks for the text of tokens.

    Raises:
        RequestError: there are none.
    """
    request = make_request(model, token_ids, stream=False, options={})
    return _exchange(url, request, "detokenize", lambda answer: str(answer["text"]))


def _exchange(url: str, request: Any, name: str, read: Callable[[Any], _T]) -> Exchange[_T]:
    request.parameters[_PARAMETER].string_param = name

    def read_answer(result: InferResult) -> list[_T]:
        return [read(json.loads(result.as_numpy("text_output")[0]))]

    return Exchange(url, request, read_answer)


def _description(answer: Any) -> Description:
    names = [each.name for each in dataclasses.fields(Description)]
    return Description(**{name: answer[name] for name in names})


def _tokens(answer: Any) -> Tokens:
    return Tokens(answer["token_ids"], answer.get("token_strs"))
