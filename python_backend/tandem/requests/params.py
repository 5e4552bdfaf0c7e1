"""How one request's tokens are chosen; every value is checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.errors import InvalidRequestError, shorten

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
GUIDES = ("json", "json_object", "regex", "choice", "grammar")
_GREEDY_TEMPERATURE = 1e-5
_MAX_STOPS = 128
_MAX_WORDS = 1024
_MAX_STRING = 1024
# Of a schema, grammar or expression, or of all choices; bounds how deep its rules can lead.
_MAX_GUIDE = 2**17


@dataclass(frozen=True)
class Guide:
    """What the whole text must match.

    Attributes:
        kind: "json" (a JSON schema), "json_object" (any JSON object), "regex", "choice" (one of
            several strings) or "grammar" (in Lark's syntax or GBNF).
        text: the schema, expression or grammar; empty for "json_object" and "choice".
        choices: the strings of a "choice".
        space: an expression for the white space between the parts of "json" and "json_object",
            empty for none; up to 64 characters in a row when None.
    """

    kind: str
    text: str = ""
    choices: tuple[str, ...] = ()
    space: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in GUIDES:
            raise InvalidRequestError(
                f"unknown kind of guide {shorten(self.kind)}; known: {', '.join(GUIDES)}"
            )
        if self.kind == "choice":
            _check_strings("choice", self.choices, _MAX_WORDS)
            if not self.choices:
                raise InvalidRequestError("choice must hold at least one string, got []")
        if not (self.kind == "json_object" or self.text or self.choices) or self.size > _MAX_GUIDE:
            raise InvalidRequestError(
                f"{self.kind} must have from 1 to {_MAX_GUIDE} characters, got {self.size}"
            )

    @property
    def size(self) -> int:
        """Characters in all."""
        return len(self.text) + sum(map(len, self.choices)) + len(self.space or "")


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Logits are changed in this order: `logit_bias`, penalties, then what is forbidden
    (`bad_words`, `min_tokens`, `guide`), `temperature`, `top_k`, `top_p`, `min_p`.

    Attributes:
        max_tokens: tokens to generate at most; with 0 the prompt alone is computed.
        min_tokens: no end of sequence, stop token or stop string before this many.
        temperature: logits are divided by it; below 1e-5 the likeliest token is taken.
        top_k: sample from the k likeliest tokens; 0 or -1 means all.
        top_p: sample from the likeliest tokens that together reach this probability.
        min_p: drop tokens below this share of the likeliest token's probability.
        repetition_penalty: logits of tokens in prompt or output are divided by it, or multiplied
            where they are negative.
        presence_penalty: taken from the logits of tokens in the output.
        frequency_penalty: the same for each time that the token is in the output.
        logit_bias: token id -> what is added to its logit.
        bad_words: strings that are never generated, as the tokenizer writes them.
        stop: strings that end the text; it ends before them.
        stop_token_ids: tokens that end the text like an end of sequence.
        include_stop_str_in_output: whether the text ends behind the stop string instead.
        ignore_eos: go on after an end-of-sequence token.
        seed: 64-bit seed; the same seed gives the same tokens. One is drawn when None.
        allowed_token_ids: only these tokens are generated; all when empty.
        skip_special_tokens: whether special tokens are left out of the text.
        logprobs: report each token's log probability, and this many of the likeliest tokens'. They
            are the verifier's own, before anything above.
        prompt_logprobs: the same of the prompt's tokens, but for the first.
        guide: what the whole text must match.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        for name, kind, low, high in _RANGES:
            _check_number(name, getattr(self, name), kind, low, high)
        if self.top_p == 0:
            raise InvalidRequestError("top_p must be above 0 and at most 1, got 0")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}"
            )
        for name, high in (
            ("seed", MAX_SEED),
            ("logprobs", MAX_LOGPROBS),
            ("prompt_logprobs", MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), int, 0, high)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                got = shorten(getattr(self, name))
                raise InvalidRequestError(f"{name} must be true or false, got {got}")
        _check_strings("stop", self.stop, _MAX_STOPS)
        _check_strings("bad_words", self.bad_words, _MAX_WORDS)
        _check_size("stop_token_ids", self.stop_token_ids, _MAX_STOPS)
        _check_size("logit_bias", self.logit_bias, _MAX_WORDS)
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name):
                _check_number(f"a token id of {name}", token_id, int, 0, 2**31 - 1)
        for bias in self.logit_bias.values():
            _check_number("logit_bias", bias, float, -100, 100)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens that came before."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0)


_RANGES: tuple[tuple[str, type, float, float], ...] = (
    ("max_tokens", int, 0, 2**31 - 1),
    ("min_tokens", int, 0, 2**31 - 1),
    ("temperature", float, 0, 100),
    ("top_k", int, -1, 2**31 - 1),
    ("top_p", float, 0, 1),
    ("min_p", float, 0, 1),
    ("repetition_penalty", float, 0.01, 100),
    ("presence_penalty", float, -2, 2),
    ("frequency_penalty", float, -2, 2),
)


def _check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    kinds = (int, float) if kind is float else (int,)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    # A NaN fails the comparison.
    if not number or not low <= value <= high:  # type: ignore[operator]
        noun = "a number" if kind is float else "a whole number"
        raise InvalidRequestError(
            f"{name} must be {noun} from {low} to {high}, got {shorten(value)}"
        )


def _check_size(name: str, values: Mapping[int, float] | tuple[object, ...], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequestError(f"{name} may hold at most {limit} elements, got {len(values)}")


def _check_strings(name: str, values: tuple[str, ...], limit: int) -> None:
    _check_size(name, values, limit)
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_STRING:
            raise InvalidRequestError(
                f"{name} must hold strings of 1 to {_MAX_STRING} characters, got {shorten(value)}"
            )
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidRequestError(
                f"{name} must hold text, got half a surrogate pair: {shorten(value)}"
            )
