"""What each sequence of a step keeps of its drafts, and what that says of its drafter."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

from tandem.acceptance.match import Verdict, match, toss
from tandem.acceptance.selection import Selection, select
from tandem.drafters.drafter import Drafter
from tandem.metrics import HIGH_TEMPERATURE, DrafterStats
from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence, Sequence
from tandem.sampling.processors import token_logprobs


def judge(
    batch: Items[ScheduledSequence],
    output: VerifierOutput,
    eos_token_ids: frozenset[int],
    rates: Items[float] = (),
) -> list[Verdict | None]:
    """Samples the verifier's token at each position and keeps the drafts that equal it.

    Args:
        batch: of the step.
        output: of the verifier's pass over it.
        eos_token_ids: the verifier's.
        rates: `synthetic_acceptance_rates`; see `toss`.

    Returns:
        None for a sequence whose prompt isn't computed to its end yet, and an empty verdict for one
        whose logits are not numbers.
    """
    yielding = [s for s in batch if s.yields_token]
    selections = select(output, yielding, eos_token_ids) if yielding else {}
    return [verdict(s, selections[s], rates) if s in selections else None for s in batch]


def verdict(
    scheduled: ScheduledSequence, selection: Selection, rates: Items[float] = ()
) -> Verdict:
    """What a sequence keeps, given the verifier's tokens; see `judge`."""
    if not selection.is_sound:
        return Verdict([], 0)
    found = _match(scheduled, selection.token_ids, rates)
    num_top = scheduled.sequence.params.logprobs
    if num_top is None:
        return found
    assert selection.logits is not None
    logprobs = token_logprobs(selection.logits, found.token_ids, num_top)
    return found._replace(logprobs=logprobs)


def coin_of(sequence: Sequence) -> random.Random:
    """What decides over a sequence's next drafts where they are accepted by coin."""
    return random.Random(hash((sequence.seed, sequence.num_tokens)))


def _match(scheduled: ScheduledSequence, token_ids: Items[int], rates: Items[float]) -> Verdict:
    if rates and not scheduled.is_forced:
        return toss(scheduled.draft_ids, token_ids, rates, coin_of(scheduled.sequence))
    return match(scheduled.draft_ids, token_ids)


def count_round(
    stats: DrafterStats,
    drafter: Drafter,
    scheduled: ScheduledSequence,
    verdict: Verdict,
    num_accepted: int,
) -> None:
    """Adds what became of a sequence's drafts to its drafter's counters.

    Args:
        num_accepted: of the drafts that the sequence took, which may have ended in them.
    """
    sequence, num_drafted = scheduled.sequence, len(scheduled.draft_ids)
    if num_drafted == 0:
        return
    stats.add_round(num_drafted, num_accepted)
    if scheduled.is_forced:
        return
    parts = [stats.tried]
    if drafter.trained_length is not None and sequence.num_tokens > drafter.trained_length:
        parts.append(stats.tried_beyond_trained_length)
    if sequence.params.temperature >= HIGH_TEMPERATURE:
        parts.append(stats.tried_at_high_temperature)
    for part in parts:
        part.add(num_drafted, num_accepted)
    rejected = num_accepted < min(num_drafted, len(verdict.token_ids))
    if rejected and drafter.vocabulary is not None:
        right = verdict.token_ids[num_accepted]
        stats.num_outside_vocabulary += right not in drafter.vocabulary
