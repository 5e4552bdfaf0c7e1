"""What the engine hands out: after each step, and for a whole request."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tandem.errors import TandemError
from tandem.sequence import FinishReason, Sequence
from tandem.text import Detokenizer


@dataclass(frozen=True)
class Delta:
    """What one step added to one sequence.

    The first `num_accepted_tokens` of `token_ids` are drafts that were accepted. The last delta of
    a sequence has a `finish_reason`.
    """

    sequence: Sequence
    token_ids: list[int]
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class RequestOutput:
    """One finished request of `Engine.generate`."""

    text: str | None
    token_ids: list[int]
    finish_reason: str
    error: TandemError | None
    num_verify_steps: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @classmethod
    def of(cls, sequence: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> RequestOutput:
        """The output of a sequence that has ended; its text is None without a tokenizer."""
        assert sequence.finish_reason is not None
        text = None
        if tokenizer is not None:
            detokenizer = Detokenizer(tokenizer)
            text = detokenizer.push(sequence.output_ids) + detokenizer.flush()
        return cls(
            text=text,
            token_ids=sequence.output_ids,
            finish_reason=sequence.finish_reason.value,
            error=sequence.error,
            num_verify_steps=sequence.num_verify_steps,
            num_drafts=sequence.num_drafts,
            num_draft_tokens=sequence.num_draft_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
        )

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens of a round that had drafts, the verifier's own included; 1 without any round."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)
