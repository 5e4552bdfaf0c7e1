"""Whether a request can be run at all, and the sequence that it becomes."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from threading import Lock

from transformers import PreTrainedTokenizerBase

from tandem.config import EngineConfig
from tandem.drafter_config import NO_DRAFTER
from tandem.errors import InvalidRequestError, shorten
from tandem.requests.grammar import GrammarCompiler
from tandem.requests.limits import TextLimits
from tandem.requests.params import SamplingParams
from tandem.requests.sequence import Sequence
from tandem.requests.text import OutputText


class _Split:
    """Deals requests out by weight, each to the drafter that is furthest behind its share."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items() if weight > 0}
        self._counts = dict.fromkeys(self._shares, 0)
        self._lock = Lock()

    def next(self) -> str:
        with self._lock:
            due = sum(self._counts.values()) + 1
            name = max(self._shares, key=lambda n: due * self._shares[n] - self._counts[n])
            self._counts[name] += 1
            return name


class Admission:
    """Checks requests and tokenizes their prompts; safe to use from any thread."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        config: EngineConfig,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._config = config
        self._lookaheads = config.max_lookaheads
        # Who gets the requests that name no drafter.
        self._split = _Split(config.drafter_weights or {config.drafter_name: 1.0})
        self._grammars = GrammarCompiler(tokenizer, vocab_size, sorted(eos_token_ids))
        self._ids = itertools.count()
        self.limits = TextLimits(tokenizer, max_model_len)

    def make_sequence(
        self,
        prompt: str | Items[int],
        params: SamplingParams,
        drafter: str | None,
        num_speculative_tokens: int | None,
        cache_salt: str,
    ) -> Sequence:
        """Checks one request and tokenizes its prompt; nothing is queued yet.

        Args:
            prompt: text, or token ids as they are.
            params: how tokens are chosen.
            drafter: a configured name, or "none"; the configured default when not given.
            num_speculative_tokens: draft tokens a step at most, up to the drafter's own limit;
                0 switches speculation off.
            cache_salt: only requests with the same one share K/V in the prefix cache.

        Raises:
            InvalidRequestError: naming the argument and what is allowed.
        """
        if drafter is None:
            drafter = self._split.next()
        max_lookahead = self._lookahead(drafter, num_speculative_tokens)
        token_ids = self._token_ids(prompt, self._max_model_len - min(1, params.max_tokens))
        self.check_token_ids("stop_token_ids", params.stop_token_ids)
        self.check_token_ids("logit_bias", params.logit_bias)
        self.check_token_ids("allowed_token_ids", params.allowed_token_ids)
        self._check_allowed(params)
        if self._tokenizer is None and (params.stop or params.bad_words or params.guide):
            raise InvalidRequestError(
                "the verifier has no tokenizer: stop, bad_words and guides need text"
            )
        return Sequence(
            id=next(self._ids),
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            drafter=drafter,
            max_lookahead=max_lookahead,
            fixed_lookahead=num_speculative_tokens is not None,
            bad_words=self._bad_words(params),
            output_text=self._output_text(params),
            grammar=self._grammars.compile(params.guide) if params.guide else None,
            prefix_keys=[self._namespace(drafter if max_lookahead else NO_DRAFTER, cache_salt)],
        )

    def _namespace(self, drafter: str, cache_salt: str) -> bytes:
        """What requests must have in common to share K/V.

        A draft model's K/V lie under the same block table as the verifier's. Blocks of requests
        that it doesn't draft for lack them, so its requests share with each other alone.
        """
        if not isinstance(cache_salt, str):
            raise InvalidRequestError(f"cache_salt must be a string, got {shorten(cache_salt)}")
        return repr((self._config.draft_model(drafter), cache_salt)).encode()

    def _output_text(self, params: SamplingParams) -> OutputText | None:
        if not params.stop:
            return None
        assert self._tokenizer is not None
        return OutputText(
            self._tokenizer,
            params.stop,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, at the beginning of a text and after a space."""
        if not params.bad_words:
            return ()
        assert self._tokenizer is not None
        texts = [text for word in params.bad_words for text in (word, " " + word.lstrip())]
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return tuple(sorted({tuple(ids) for ids in encoded if ids}))

    def _lookahead(self, drafter: str, limit: int | None) -> int:
        if drafter not in self._lookaheads:
            raise InvalidRequestError(
                f"unknown drafter {shorten(drafter)}; loaded: {', '.join(self._lookaheads)}"
            )
        ceiling = self._lookaheads[drafter]
        if limit is None:
            return ceiling
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise InvalidRequestError(
                f"num_speculative_tokens must be a whole number from 0, got {shorten(limit)}"
            )
        return min(limit, ceiling)

    def _token_ids(self, prompt: str | Items[int], most: int) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequestError("the verifier has no tokenizer: give token ids, not text")
            self.limits.check_text("the prompt", prompt)
            token_ids: list[int] = list(self._tokenizer(prompt)["input_ids"])
        else:
            token_ids = list(prompt)
            self.check_token_ids("prompt token ids", token_ids)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty: give at least one token")
        if len(token_ids) > most:
            raise InvalidRequestError(
                f"the prompt is too long: this model's maximum context length is "
                f"{self._max_model_len} tokens (max_model_len). However, your prompt resulted in "
                f"{len(token_ids)} tokens; at most {most} leave room for an answer"
            )
        return token_ids

    def _check_allowed(self, params: SamplingParams) -> None:
        """Something must be left where the text may not end yet."""
        ends = {*self._eos_token_ids, *params.stop_token_ids} if params.min_tokens else set()
        if params.allowed_token_ids and not {*params.allowed_token_ids} - ends:
            raise InvalidRequestError(
                "allowed_token_ids allow nothing but tokens that end the text, which min_tokens, "
                f"{params.min_tokens}, forbids: allow others, or leave min_tokens out"
            )

    def check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        """Refuses tokens that the verifier doesn't have.

        Raises:
            InvalidRequestError: naming the argument, and the first of them.
        """
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
                got = shorten(token_id)
                raise InvalidRequestError(
                    f"{name} must be whole numbers below {self._vocab_size}, got {got}"
                )
