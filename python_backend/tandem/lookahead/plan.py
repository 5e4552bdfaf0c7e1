"""Which sequences of a step are worth drafting for, before any guess is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

from tandem.lookahead.costs import CostModel
from tandem.requests.sequence import ScheduledSequence

# Rows over which the slope of the pass's cost is taken.
_AHEAD = 16


@dataclass(frozen=True)
class BarePass:
    """A step's verifier pass without any drafts: tokens that get logits, and those that don't."""

    num_rows: int
    num_sequences: int
    num_prompt_tokens: int

    @classmethod
    def of(cls, batch: Items[ScheduledSequence]) -> BarePass:
        """The pass of a batch whose drafts are not made yet."""
        num_rows = sum(s.yields_token for s in batch)
        return cls(num_rows, len(batch), sum(s.num_tokens for s in batch) - num_rows)

    def seconds(self, costs: CostModel, num_rows: int) -> float:
        """What it takes if drafts make its rows `num_rows`."""
        return costs.verify(num_rows, self.num_sequences, self.num_prompt_tokens)


@dataclass(frozen=True)
class Plan:
    """Which sequences get drafts, and the step's tokens and seconds to be expected then.

    `depths` says how many guesses the rounds of each drafter have.
    """

    tokens: float
    seconds: float
    chosen: frozenset[ScheduledSequence] = frozenset()
    depths: Mapping[str, int] = field(default_factory=dict)


def best_plan(
    bare: BarePass, gains: Mapping[ScheduledSequence, list[float]], costs: CostModel
) -> Plan:
    """The plan with the most tokens a second, taking the likeliest guesses first.

    Args:
        gains: for each sequence that may have drafts, the expected tokens of each guess: the
            chance that it and all before it are accepted.
    """
    tokens = float(max(1, bare.num_rows))
    best = Plan(tokens, costs.rest + bare.seconds(costs, bare.num_rows))
    # A guess that brings less than half of what its row costs needs no thought.
    row = (
        bare.seconds(costs, bare.num_rows + _AHEAD) - bare.seconds(costs, bare.num_rows)
    ) / _AHEAD
    least = best.tokens / best.seconds * row / 2
    sequences = list(gains)
    guesses = sorted(
        (
            (gain, -position, index)
            for index, sequence in enumerate(sequences)
            for position, gain in enumerate(gains[sequence])
            if gain > least
        ),
        reverse=True,
    )
    drafting: dict[str, set[int]] = defaultdict(set)
    depths: dict[str, int] = defaultdict(int)
    draft: dict[str, float] = {}
    num_best = 0
    for count, (gain, position, index) in enumerate(guesses, start=1):
        drafter = sequences[index].sequence.drafter
        if index not in drafting[drafter] or depths[drafter] < 1 - position:
            drafting[drafter].add(index)
            depths[drafter] = max(depths[drafter], 1 - position)
            draft[drafter] = costs.draft(drafter, len(drafting[drafter]), depths[drafter])
        tokens += gain
        seconds = costs.rest + sum(draft.values()) + bare.seconds(costs, bare.num_rows + count)
        if tokens * best.seconds > best.tokens * seconds:
            best, num_best = Plan(tokens, seconds, depths=dict(depths)), count
    chosen = frozenset(sequences[index] for _, _, index in guesses[:num_best])
    return replace(best, chosen=chosen)
