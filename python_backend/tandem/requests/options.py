"""One request's options as clients send them, by the names of several servers.

Names, types and meanings are those of Triton's vLLM backend and of TensorRT-LLM's; where they have
two names for one thing, vLLM's is the canonical one. Numbers may come as numeric strings.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.errors import InvalidRequestError, shorten
from tandem.requests.json_size import check_json
from tandem.requests.params import Guide, SamplingParams

MAX_SEQUENCES = 64
_SAMPLING = {
    "max_tokens": "int",
    "min_tokens": "int",
    "temperature": "float",
    "top_k": "int",
    "top_p": "float",
    "min_p": "float",
    "repetition_penalty": "float",
    "presence_penalty": "float",
    "frequency_penalty": "float",
    "logit_bias": "biases",
    "bad_words": "strings",
    "stop": "strings",
    "stop_token_ids": "ints",
    "include_stop_str_in_output": "bool",
    "ignore_eos": "bool",
    "seed": "int",
    "logprobs": "int",
}
_OWN = {
    "n": "int",
    "drafter": "str",
    "num_speculative_tokens": "int",
    "cache_salt": "str",
    "stream": "bool",
    "exclude_input_in_output": "bool",
    "return_logprobs": "bool",
    "return_token_ids": "bool",
    "return_perf_metrics": "bool",
    "embedding_bias_words": "strings",
    "embedding_bias_weights": "floats",
}
_GUIDE = {
    "structured_outputs": "object",
    "guided_decoding_guide_type": "str",
    "guided_decoding_guide": "str",
}
# TensorRT-LLM's name for each, or an older one of vLLM's.
_ALIASES = {
    "min_length": "min_tokens",
    "stop_words": "stop",
    "num_draft_tokens": "num_speculative_tokens",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "return_log_probs": "return_logprobs",
    "return_cumulative_logprob": "return_logprobs",
    "guided_decoding": "structured_outputs",
}
# What is sent in any case, or means nothing without beam search: name -> kind and allowed value.
_FIXED: dict[str, tuple[str, Any]] = {
    "beam_width": ("int", 1),
    "return_context_logits": ("bool", False),
    "return_generation_logits": ("bool", False),
    "use_draft_logits": ("bool", False),
    "use_beam_search": ("bool", False),
}
_IGNORED = (
    "best_of",
    "early_stopping",
    "length_penalty",
    "pad_id",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
_KINDS = {
    **_SAMPLING,
    **_OWN,
    **_GUIDE,
    "end_id": "int",
    **{name: kind for name, (kind, _) in _FIXED.items()},
}
NAMES = (*_KINDS, *_ALIASES, *_IGNORED)

_NOUNS = {
    "str": "a string",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "strings": "a list of strings",
    "ints": "a list of whole numbers",
    "floats": "a list of numbers",
    "biases": "an object of token ids and numbers",
    "object": "an object",
}
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_GUIDE_TYPES = {
    "json_schema": "json",
    "regex": "regex",
    "ebnf_grammar": "grammar",
}


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


def parse_options(*sources: Mapping[str, Any]) -> RequestOptions:
    """Reads options from mappings, of which earlier ones win; in one, canonical names win.

    Raises:
        InvalidRequestError: naming the option, its value, and what is allowed.
    """
    given: dict[str, Any] = {}
    for source in reversed(sources):
        known = {name: value for name, value in source.items() if value is not None}
        given |= {_ALIASES[name]: known.pop(name) for name in list(known) if name in _ALIASES}
        given |= known
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise InvalidRequestError(
            f"unknown parameter {shorten(unknown[0])}; allowed: {', '.join(sorted(NAMES))}"
        )
    values = {
        name: _convert(name, value, _KINDS[name])
        for name, value in given.items()
        if name not in _IGNORED
    }
    for name, (_, allowed) in _FIXED.items():
        if values.pop(name, allowed) != allowed:
            raise InvalidRequestError(f"{name} must be {allowed}, got {shorten(given[name])}")
    own = {name: values.pop(name) for name in list(values) if name in _OWN}
    return RequestOptions(_sampling_params(values, own.get("return_logprobs", False)), **own)


def _sampling_params(values: dict[str, Any], return_logprobs: bool) -> SamplingParams:
    guide = _guide({name: values.pop(name) for name in list(values) if name in _GUIDE})
    end_id = values.pop("end_id", -1)
    if end_id >= 0:
        values["stop_token_ids"] = (*values.get("stop_token_ids", ()), end_id)
    if return_logprobs:
        values.setdefault("logprobs", 0)
    return SamplingParams(**values, guide=guide)


def _guide(values: dict[str, Any]) -> Guide | None:
    if "structured_outputs" in values:
        return _structured_outputs(values["structured_outputs"])
    kind, text = (values.get(f"guided_decoding_guide{suffix}") for suffix in ("_type", ""))
    if kind is None and text is None:
        return None
    if kind == "json":
        return Guide("json", "{}")
    if kind not in _GUIDE_TYPES:
        known = ", ".join(["json", *_GUIDE_TYPES])
        raise InvalidRequestError(
            f"guided_decoding_guide_type must be one of {known}, got {shorten(kind)}"
        )
    return Guide(_GUIDE_TYPES[kind], text or "")


def _structured_outputs(values: dict[str, Any]) -> Guide:
    values = {name: value for name, value in values.items() if value not in (None, False)}
    if len(values) != 1:
        raise InvalidRequestError(
            "structured_outputs must have exactly one of json, json_object, regex, choice and "
            f"grammar, got {shorten(sorted(values))}"
        )
    ((kind, value),) = values.items()
    if kind == "choice":
        return Guide(kind, choices=_convert("choice", value, "strings"))
    if kind == "json_object":
        return Guide(kind)
    if kind == "json" and isinstance(value, (dict, bool)):
        value = json.dumps(value)
    return Guide(kind, _convert(kind, value, "str"))


def with_bias(params: SamplingParams, bias: Mapping[int, float]) -> SamplingParams:
    """`params` with another bias on top of its own."""
    total = dict(params.logit_bias)
    for token_id, value in bias.items():
        total[token_id] = total.get(token_id, 0.0) + value
    return dataclasses.replace(params, logit_bias=total)


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Reads a JSON object that a client sent in the input `name`.

    Raises:
        InvalidRequestError: it isn't JSON, not an object, or holds too much.
    """
    check_json(name, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name} must be a JSON object, got {shorten(value)}")
    return value


def _convert(name: str, value: Any, kind: str) -> Any:
    """Clients such as genai-perf send every number as a string, and others JSON in strings."""
    try:
        return _CONVERTERS[kind](name, value)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        raise InvalidRequestError(f"{name} must be {_NOUNS[kind]}, got {shorten(value)}") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half of a surrogate pair is no text
    return value


def _boolean(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    if not isinstance(value, (str, int, float)):
        raise TypeError
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    return float(value)


def _list(name: str, value: Any) -> list[Any]:
    """A list, or one in JSON, or a single value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        check_json(name, value)
        value = json.loads(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # a stop string may well begin with a bracket
        return (_text(name, value),)
    return tuple(_text(name, item) for item in _list(name, value))


def _object(name: str, value: Any) -> dict[Any, Any]:
    if isinstance(value, str):
        value = parse_json(name, value)
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


_CONVERTERS: dict[str, Any] = {
    "str": _text,
    "bool": _boolean,
    "int": _integer,
    "float": _number,
    "strings": _strings,
    "ints": lambda name, value: tuple(_integer(name, item) for item in _list(name, value)),
    "floats": lambda name, value: tuple(_number(name, item) for item in _list(name, value)),
    "biases": lambda name, value: {
        _integer(name, token_id): _number(name, bias)
        for token_id, bias in _object(name, value).items()
    },
    "object": _object,
}
