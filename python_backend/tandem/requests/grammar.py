"""Text that has to match a schema, expression or grammar; the parsing is llguidance's.

llguidance rather than xgrammar: it needs no compilation that grows with the vocabulary, names
forced tokens, and checks and rolls back drafts by itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Items
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from tandem.errors import InvalidRequestError
from tandem.requests.check_guides import STACK_BYTES
from tandem.requests.guide_checker import GuideChecker, refusal
from tandem.requests.params import Guide

# Characters of guides that are kept compiled, each some 400 bytes then.
_MAX_KEPT = 2**19


class Grammar:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the text matches and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def push(self, token_id: int) -> str:
        """Moves on by one token; why it can't, if it can't."""
        self._matcher.consume_token(token_id)
        if not self._matcher.is_error():
            return ""
        return _reason(self._matcher, "no text that matches the guide begins like this one")

    def forced(self) -> list[int]:
        """The tokens that come next whatever the verifier says, as far as they are known."""
        return self._matcher.compute_ff_tokens()

    def num_valid(self, token_ids: Items[int]) -> int:
        """How many of these tokens, from the first on, could come next."""
        return self._matcher.validate_tokens(list(token_ids))

    def masks(self, token_ids: Items[int]) -> list[bytes]:
        """What may come next, and after each of `token_ids`, all of which are valid.

        Each mask has a bit for each token of the vocabulary, padded to whole words of 32 bits. Once
        the library has given up, which the next `push` says, they only hold the end.
        """
        masks = [self._matcher.compute_bitmask()]
        for token_id in token_ids:
            self._matcher.consume_token(token_id)
            masks.append(self._matcher.compute_bitmask())
        if token_ids:
            self._matcher.rollback(len(token_ids))
        return masks


class GrammarCompiler:
    """Makes grammars for one tokenizer; safe to use from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Items[int]) -> None:
        """Prepares the tokenizer, which takes seconds for a large vocabulary."""
        self._checker = GuideChecker()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._why_not = "the verifier has no tokenizer"
        if tokenizer is not None:
            try:
                self._tokenizer = from_tokenizer(tokenizer, vocab_size, list(eos_token_ids) or None)
            except ValueError as error:  # it isn't one of the fast ones
                self._why_not = f"the verifier's tokenizer: {error}"

    def compile(self, guide: Guide) -> Grammar:
        """The grammar of a guide, at its start.

        Raises:
            InvalidRequestError: the guide isn't one, takes too much or matches nothing, with the
                reason.
        """
        if self._tokenizer is None:
            raise InvalidRequestError(refusal(guide, self._why_not))
        with self._lock:
            matcher = self._kept.get(guide)
            if matcher is not None:
                self._kept.move_to_end(guide)
        if matcher is None:
            matcher = self._compile(guide)
            self._keep(guide, matcher)
        return Grammar(matcher.deep_copy())

    def _compile(self, guide: Guide) -> LLMatcher:
        source = self._checker.check(guide)
        results: list[tuple[LLMatcher, str]] = []
        _run_on_deep_stack(lambda: results.append(self._try(source)))
        matcher, error = results.pop()
        if error:
            raise InvalidRequestError(refusal(guide, error))
        return matcher

    def _try(self, source: str) -> tuple[LLMatcher, str]:
        """A matcher, tried on its first tokens, where some only fail, and what is wrong with it."""
        assert self._tokenizer is not None
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        first = matcher.compute_bitmask()
        matcher.consume_tokens(matcher.compute_ff_tokens())
        matcher.reset()
        if matcher.is_error():
            return matcher, _reason(matcher, "no text matches it")
        num_ends = sum(first[each // 8] >> each % 8 & 1 for each in self._tokenizer.eos_tokens)
        if int.from_bytes(first, "little").bit_count() == num_ends:
            return matcher, "only the empty text matches it"
        return matcher, ""

    def _keep(self, guide: Guide, matcher: LLMatcher) -> None:
        with self._lock:
            self._kept[guide] = matcher
            while sum(each.size for each in self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)


def _run_on_deep_stack(work: Any) -> None:
    """Runs it where there is twice the stack that the check had to do with."""
    with _stack_lock:
        usual = threading.stack_size(2 * STACK_BYTES)
        try:
            thread = threading.Thread(target=work, name="tandem-guide")
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()


_stack_lock = threading.Lock()


def _reason(matcher: LLMatcher, nothing_follows: str) -> str:
    """The library's own, but where that is a mere name."""
    error = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if error == "NoExtensionBias":
        return nothing_follows
    if "doesn't satisfy the grammar" in error:
        return "the guide and the other parameters together leave no token to generate"
    return error
