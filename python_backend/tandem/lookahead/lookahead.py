"""How far to draft: as far as it is allowed, unless something better decides."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

from tandem.lookahead.costs import CostModel
from tandem.lookahead.estimates import NUM_BINS
from tandem.lookahead.prompt_budget import NO_LIMITS, PromptLimits
from tandem.requests.sequence import ScheduledSequence, Sequence


def draft_limit(sequence: Sequence, max_model_len: int) -> int:
    """Draft tokens that `sequence` can use in its next pass at most.

    A pass yields the accepted drafts and one token more, so drafting as many tokens as the
    sequence may still produce would always waste the last.
    """
    remaining = min(
        sequence.params.max_tokens - sequence.num_output_tokens,
        max_model_len - sequence.num_tokens,
    )
    return max(0, min(sequence.max_lookahead, remaining - 1))


class Lookahead:
    """Drafts as many tokens as are allowed."""

    costs: CostModel | None = None

    def prompt_limits(self, num_decoding: int, num_prompts: int) -> PromptLimits:
        """See `PromptBudget.limits`."""
        return NO_LIMITS

    def plan(self, batch: Items[ScheduledSequence]) -> None:
        """Lowers `num_draft_tokens` to 0 where drafting isn't worth its time."""

    def goes_on(self, sequences: Items[Sequence], confidences: Items[Items[float]]) -> bool:
        """Whether a round's next guess pays, given what its drafter said of those so far."""
        return True

    def choose(self, batch: Items[ScheduledSequence]) -> None:
        """Lowers `num_draft_tokens` to the drafts that are worth verifying."""
        for scheduled in batch:
            scheduled.num_draft_tokens = len(scheduled.draft_ids)

    # --- the same where guesses are made and chosen on the device

    def allow(self, batch: Items[ScheduledSequence]) -> int:
        """Draft tokens that the pass may verify, before guesses are made.

        Lowers `num_draft_tokens` to guesses worth making, where there is no draft yet.
        """
        return sum(scheduled.num_draft_tokens for scheduled in batch)

    def gains(self, scheduled: ScheduledSequence) -> list[float] | None:
        """Expected tokens of each draft; None if that is up to how sure its drafter will be."""
        return [1.0] * scheduled.num_draft_tokens

    def chances(self, sequence: Sequence) -> list[float]:
        """The chance that a guess is accepted, by the bin of its confidence; `NUM_BINS` of them."""
        return [1.0] * NUM_BINS

    def settle(self, batch: Items[ScheduledSequence]) -> None:
        """Takes what became of `num_draft_tokens`."""

    # --- after the step

    def observe(
        self,
        batch: Items[ScheduledSequence],
        num_accepted: Items[int | None],
        seconds: Mapping[str, float],
    ) -> None:
        """Learns from a step.

        Args:
            num_accepted: drafts of each sequence; None where the pass yielded no token.
            seconds: by phase.
        """

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept about a sequence that has ended."""
