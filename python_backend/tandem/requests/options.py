"""One request's options, as the engine takes them; their names and values are `tandem_options`'."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import tandem_options
from tandem.errors import InvalidRequestError, refusing, shorten
from tandem.requests.guide_options import NAMES, parse_guide
from tandem.requests.params import SamplingParams

MAX_SEQUENCES = 64


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt becomes tokens.

    Attributes:
        truncate_prompt_tokens: how many tokens are kept, the last ones; -1 for as many as there is
            room for.
        add_special_tokens: whether the tokenizer adds its own; to a text by default.
        add_generation_prompt: whether a conversation ends with the beginning of an answer; by
            default, unless its last message goes on.
        continue_final_message: whether it does.
        chat_template_kwargs: what the chat template is told beside the messages.
        reasoning_effort: the same, by OpenAI's name.
    """

    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None

    def __post_init__(self) -> None:
        kept = self.truncate_prompt_tokens
        if kept is not None and kept != -1 and kept < 1:
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be a whole number from 1, or -1, got {shorten(kept)}"
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message can't both be true: an answer "
                "begins, or the last message goes on"
            )


@dataclass(frozen=True)
class RequestOptions:
    """Everything but the prompt.

    Attributes:
        params: how tokens are chosen.
        n: how many sequences to generate; sequence i has the seed `seed + i`.
        drafter, num_speculative_tokens, cache_salt: as in `Engine.make_sequence`.
        stream: whether each step's text is sent at once.
        exclude_input_in_output: whether the prompt is left out of the text.
        return_logprobs, return_token_ids, return_perf_metrics: what to send along.
        embedding_bias_words, embedding_bias_weights: a bias for each token of each word.
        prompt: how the prompt is read.
        request_id: what the log calls the request.
        unknown: names that are in no table.
    """

    params: SamplingParams
    n: int = 1
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    cache_salt: str = ""
    stream: bool = False
    exclude_input_in_output: bool = True
    return_logprobs: bool = False
    return_token_ids: bool = False
    return_perf_metrics: bool = False
    embedding_bias_words: tuple[str, ...] = ()
    embedding_bias_weights: tuple[float, ...] = ()
    prompt: PromptOptions = PromptOptions()
    request_id: str = ""
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_SEQUENCES:
            raise InvalidRequestError(
                f"n must be a whole number from 1 to {MAX_SEQUENCES}, got {shorten(self.n)}"
            )
        words, weights = self.embedding_bias_words, self.embedding_bias_weights
        if len(words) != len(weights):
            raise InvalidRequestError(
                "embedding_bias_words and embedding_bias_weights must have the same length, got "
                f"{len(words)} and {len(weights)}"
            )


_OWN = {each.name for each in fields(RequestOptions)} - {"params", "prompt", "unknown"}
_PROMPT = {each.name for each in fields(PromptOptions)}


def parse_options(*sources: Mapping[str, Any]) -> RequestOptions:
    """Reads options from mappings, of which earlier ones win; in one, canonical names win.

    Raises:
        InvalidRequestError: naming the option, its value, and what is allowed.
    """
    with refusing():
        reading = tandem_options.read(*sources)
        values = dict(reading.values)
        own = {name: values.pop(name) for name in list(values) if name in _OWN}
        prompt = {name: values.pop(name) for name in list(values) if name in _PROMPT}
        params = _sampling_params(values, own.get("return_logprobs", False))
    return RequestOptions(params, **own, prompt=PromptOptions(**prompt), unknown=reading.unknown)


def _sampling_params(values: dict[str, Any], return_logprobs: bool) -> SamplingParams:
    guide = parse_guide({name: values.pop(name) for name in list(values) if name in NAMES})
    end_id = values.pop("end_id", -1)
    if end_id >= 0:
        values["stop_token_ids"] = (*values.get("stop_token_ids", ()), end_id)
    if return_logprobs:
        values.setdefault("logprobs", 0)
    return SamplingParams(**values, guide=guide)


def with_bias(params: SamplingParams, bias: Mapping[int, float]) -> SamplingParams:
    """`params` with another bias on top of its own."""
    total = dict(params.logit_bias)
    for token_id, value in bias.items():
        total[token_id] = total.get(token_id, 0.0) + value
    return dataclasses.replace(params, logit_bias=total)


def with_stops(params: SamplingParams, token_ids: Iterable[int]) -> SamplingParams:
    """`params` that these tokens end the text of, besides its own."""
    stops = dict.fromkeys((*params.stop_token_ids, *sorted(token_ids)))
    return dataclasses.replace(params, stop_token_ids=tuple(stops))


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Reads a JSON object that a client sent in the input `name`.

    Raises:
        InvalidRequestError: it isn't JSON, not an object, or holds too much.
    """
    with refusing():
        return tandem_options.parse_json(name, text)
