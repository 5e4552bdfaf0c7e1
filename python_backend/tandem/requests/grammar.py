"""Text that has to match a schema, expression or grammar; the parsing is llguidance's.

llguidance rather than xgrammar: it needs no compilation that grows with the vocabulary, names
forced tokens, and checks and rolls back drafts by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from threading import Lock
from typing import Any

from llguidance import GrammarFormat, LLMatcher, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer

from tandem.errors import InvalidRequestError
from tandem.requests.params import Guide

_FORMATS: dict[str, GrammarFormat] = {"json": "json", "regex": "regex", "grammar": "grammar"}
_MAX_MESSAGE = 300


class Grammar:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the text matches and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def push(self, token_id: int) -> bool:
        """Moves on by one token; False if the grammar doesn't allow it."""
        return self._matcher.consume_token(token_id)

    def forced(self) -> list[int]:
        """The tokens that come next whatever the verifier says, as far as they are known."""
        return self._matcher.compute_ff_tokens()

    def num_valid(self, token_ids: Items[int]) -> int:
        """How many of these tokens, from the first on, could come next."""
        return self._matcher.validate_tokens(list(token_ids))

    def masks(self, token_ids: Items[int]) -> list[bytes]:
        """What may come next, and after each of `token_ids`, all of which are valid.

        Each mask has a bit for each token of the vocabulary, padded to whole words of 32 bits.
        """
        masks = [self._matcher.compute_bitmask()]
        try:
            for count, token_id in enumerate(token_ids, start=1):  # noqa: B007
                assert self._matcher.consume_token(token_id), self._matcher.get_error()
                masks.append(self._matcher.compute_bitmask())
        finally:
            if token_ids:
                self._matcher.rollback(count)
        return masks


class GrammarCompiler:
    """Makes grammars for one tokenizer; safe to use from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Items[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._wrapped: LLTokenizer | None = None
        self._lock = Lock()

    def compile(self, guide: Guide) -> Grammar:
        """The grammar of a guide, at its start.

        Raises:
            InvalidRequestError: the guide isn't one, with the reason.
        """
        with self._lock:  # takes a second, the first time
            if self._wrapped is None:
                eos = self._eos_token_ids or None
                self._wrapped = from_tokenizer(self._tokenizer, self._vocab_size, eos)
        try:
            matcher = LLMatcher(self._wrapped, _source(guide), log_level=0)
        except ValueError as error:
            raise InvalidRequestError(_refusal(guide, str(error))) from error
        if matcher.is_error():
            raise InvalidRequestError(_refusal(guide, matcher.get_error()))
        return Grammar(matcher)


def _source(guide: Guide) -> str:
    if guide.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if guide.kind == "choice":
        return grammar_from("choice", json.dumps(guide.choices))
    return grammar_from(_FORMATS[guide.kind], guide.text)


def _refusal(guide: Guide, reason: str) -> str:
    return f"{guide.kind} can't be used as a guide: {reason.strip()[:_MAX_MESSAGE]}"
