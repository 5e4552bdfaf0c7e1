"""What the engine hands out: after each step, and for a whole request."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from tandem.errors import TandemError
from tandem.requests.logprobs import TokenLogprobs
from tandem.requests.sequence import FinishReason, Sequence
from tandem.requests.text import OutputText, Tokenizer


@dataclass(frozen=True)
class Delta:
    """What one step added to one sequence.

    The first `num_accepted_tokens` of `token_ids` are drafts that were accepted. `logprobs` has an
    entry for each token if the request asked for them. The last delta of a sequence has a
    `finish_reason`.
    """

    sequence: Sequence
    token_ids: list[int]
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    logprobs: Items[TokenLogprobs] = ()
    finish_reason: FinishReason | None = None


def output_text(tokenizer: Tokenizer, sequence: Sequence) -> OutputText:
    """What turns the sequence's tokens into the text that its client sees."""
    params = sequence.params
    return OutputText(
        tokenizer,
        params.stop,
        min_tokens=params.min_tokens,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
    )


def shown_ids(sequence: Sequence, token_ids: list[int]) -> list[int]:
    """The tokens whose text is shown: one that ended the sequence is not."""
    hidden = sequence.ended_by_token and not sequence.params.include_stop_str_in_output
    return token_ids[:-1] if hidden else token_ids


@dataclass(frozen=True)
class RequestOutput:
    """One finished request of `Engine.generate`; text and tokens as in `Delta`.

    `prompt_logprobs` has an entry for each of the prompt's tokens but the first if the request
    asked for them.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    error: TandemError | None
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    num_verify_steps: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_cached_tokens: int

    @classmethod
    def of(
        cls, sequence: Sequence, logprobs: list[TokenLogprobs], tokenizer: Tokenizer | None
    ) -> RequestOutput:
        """The output of a sequence that has ended; its text is None without a tokenizer."""
        assert sequence.finish_reason is not None
        text = None
        if tokenizer is not None:
            shown = output_text(tokenizer, sequence)
            text = shown.push(shown_ids(sequence, sequence.output_ids)) + shown.flush()
        return cls(
            text=text,
            token_ids=sequence.output_ids,
            finish_reason=sequence.finish_reason.value,
            stop_reason=sequence.stop_reason,
            error=sequence.error,
            logprobs=logprobs,
            prompt_logprobs=sequence.prompt_logprobs,
            num_verify_steps=sequence.num_verify_steps,
            num_drafts=sequence.num_drafts,
            num_draft_tokens=sequence.num_draft_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens of a round that had drafts, the verifier's own included; 1 without any round."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)
