"""One request's tokens, and where it stands between arrival and its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from tandem.errors import InvalidRequestError, TandemError
from tandem.requests.grammar import Grammar
from tandem.requests.logprobs import TokenLogprobs
from tandem.requests.params import SamplingParams
from tandem.requests.text import OutputText


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


# Stands in a table where a block was.
GIVEN_BACK = -1


@dataclass(eq=False)
class BlockTable:
    """A sequence's blocks in one group of layers, one for each `block_size` tokens.

    The first `start` have been given back, since no query reaches them any more.
    """

    blocks: list[int] = field(default_factory=list)
    start: int = 0


@dataclass(eq=False)
class Sequence:
    """The state of one request.

    A round has `max_lookahead` draft tokens at most; exactly as many, where there is room, with
    `fixed_lookahead`.

    `token_ids` holds prompt and output. The K/V of the first `num_computed` tokens are in the
    cache and committed; while the sequence decodes, exactly one token is left to compute. Of
    these, `num_cached_tokens` were in the cache when the sequence was last admitted.

    `bad_words` are those of `params` as tokens. `output_text` is there when stop strings have to be
    looked for, `grammar` when the text has to match a guide. `stop_reason` is the stop string or
    stop token that ended the text; `started_at` (`time.monotonic`) is when it was first scheduled.
    `prefix_keys` begins with that of the empty prefix: sequences share K/V only where it is the
    same. The block pool adds one for each full block, and has offered the first
    `num_shared_blocks` of the tables to others, one table for each group of layers.
    `prompt_logprobs` grows as the prompt is computed, where they are asked for.
    """

    id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    drafter: str
    max_lookahead: int
    fixed_lookahead: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()
    output_text: OutputText | None = None
    grammar: Grammar | None = None
    started_at: float | None = None
    num_computed: int = 0
    num_cached_tokens: int = 0
    prefix_keys: list[bytes] = field(default_factory=lambda: [b""])
    block_tables: list[BlockTable] = field(default_factory=list)
    num_shared_blocks: int = 0
    cancellation: TandemError | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    ended_by_token: bool = False
    error: TandemError | None = None
    num_verify_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose K/V are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens, an end-of-sequence token included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose log probabilities are asked for and not known yet."""
        if self.params.prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)

    @property
    def num_reusable(self) -> int:
        """Tokens at the start that need no pass if their K/V are there.

        Behind the last one a token is sampled, and behind others the next is scored.
        """
        return len(self.prompt_logprobs) if self.num_unscored else self.num_tokens - 1

    @property
    def is_decoding(self) -> bool:
        """Whether the next pass computes one known token, so that drafts may follow it."""
        return self.num_uncomputed == 1 and self.num_output_tokens > 0

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended, for whatever reason."""
        return self.finish_reason is not None

    def extend(
        self, token_ids: list[int], eos_token_ids: frozenset[int], max_model_len: int
    ) -> list[int]:
        """Appends tokens up to one that ends the sequence; those that were appended."""
        if token_ids and self.params.max_tokens == 0:
            self.finish(FinishReason.LENGTH)
            return []
        for index, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            self._check_end(token_id, eos_token_ids, max_model_len)
            if self.is_finished:
                return token_ids[: index + 1]
        return token_ids

    def add_round(self, num_drafted: int, num_accepted: int) -> None:
        """Counts a pass behind which tokens were appended, `num_accepted` of them drafts."""
        # The K/V of accepted drafts are valid; those of rejected ones lie behind the length.
        self.num_computed += num_accepted
        self.num_verify_steps += 1
        self.num_drafts += num_drafted > 0
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted

    def _check_end(self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        """Finishes the sequence if the token just appended ends it."""
        params = self.params
        if self.grammar is not None and (error := self.grammar.push(token_id)):
            self.finish(FinishReason.ERROR, InvalidRequestError(error))
        elif token_id in eos_token_ids and not params.ignore_eos:
            self.ended_by_token = True
            self.finish(FinishReason.STOP)
        elif token_id in params.stop_token_ids:
            self.ended_by_token = True
            self.stop_reason = token_id
            self.finish(FinishReason.STOP)
        elif self._has_stop_string(token_id) or (
            self.grammar is not None and self.grammar.is_complete
        ):
            self.finish(FinishReason.STOP)
        elif self.num_output_tokens >= params.max_tokens or self.num_tokens >= max_model_len:
            self.finish(FinishReason.LENGTH)

    def _has_stop_string(self, token_id: int) -> bool:
        if self.output_text is None:
            return False
        self.output_text.push([token_id])
        self.stop_reason = self.output_text.matched
        return self.stop_reason is not None

    def finish(self, reason: FinishReason, error: TandemError | None = None) -> None:
        """Ends the sequence; it never runs again."""
        assert not self.is_finished, f"sequence {self.id} ended twice"
        self.finish_reason = reason
        self.error = error


class Draft(NamedTuple):
    """What a drafter guesses for one sequence.

    `confidences` says how sure it is of each token if those before it are right, from 0 to 1;
    empty if it can't say. `source` tells guesses apart whose confidences mean different things.
    """

    token_ids: list[int]
    confidences: list[float] = []  # noqa: RUF012
    source: str = ""

    def first(self, count: int) -> Draft:
        """The draft's first `count` tokens."""
        return self._replace(token_ids=self.token_ids[:count], confidences=self.confidences[:count])


@dataclass(eq=False)
class ScheduledSequence:
    """One sequence's part of a step.

    The pass computes `num_tokens` known tokens, then the first `num_draft_tokens` of `draft`.
    Until there is a draft, that is how long it may be at most. A draft `is_forced` if a grammar
    leaves no other tokens.
    """

    sequence: Sequence
    num_tokens: int
    num_draft_tokens: int
    draft: Draft = field(default_factory=lambda: Draft([]))
    is_forced: bool = False

    @property
    def draft_ids(self) -> list[int]:
        """The draft tokens that the pass computes."""
        return self.draft.token_ids[: self.num_draft_tokens]

    @property
    def yields_token(self) -> bool:
        """Whether the pass reaches the end of the known tokens, so that a next one is sampled."""
        return self.num_tokens == self.sequence.num_uncomputed

    @property
    def scored_rows(self) -> range:
        """Of the pass's known tokens those behind which the prompt's next one is scored."""
        start, first = self.sequence.num_computed, len(self.sequence.prompt_logprobs)
        stop = min(start + self.num_tokens, first + self.sequence.num_unscored)
        return range(max(start, first) - start, max(0, stop - start))

    @property
    def num_rows(self) -> int:
        """Logits that a yielding sequence gets: behind its last known token and each draft."""
        return len(self.draft_ids) + 1
