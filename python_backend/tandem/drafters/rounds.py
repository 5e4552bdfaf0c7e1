"""One round of drafting: each drafter guesses for its sequences, a grammar forces what it can."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Items

from tandem.drafters.drafter import Drafter, DraftRequest, GoesOn
from tandem.requests.sequence import Draft, ScheduledSequence, Sequence

# Tokens that a drafter may have to catch up on; what they reach stays in the cache until then.
_MAX_LAG = 64


def force(batch: Items[ScheduledSequence]) -> None:
    """Drafts the tokens that a grammar leaves no choice about; they need no drafter."""
    for scheduled in batch:
        grammar = scheduled.sequence.grammar
        if scheduled.num_draft_tokens > 0 and grammar is not None:
            scheduled.draft = Draft(grammar.forced()).first(scheduled.num_draft_tokens)
            scheduled.is_forced = bool(scheduled.draft.token_ids)


def propose(
    drafters: Mapping[str, Drafter], batch: Items[ScheduledSequence], goes_on: GoesOn
) -> None:
    """Lets each drafter see its prompts, catch up, and guess for its sequences that decode.

    Args:
        goes_on: see `Drafter.propose`.
    """
    guessing: dict[str, list[ScheduledSequence]] = defaultdict(list)
    prompts: dict[str, list[ScheduledSequence]] = defaultdict(list)
    for scheduled in batch:
        sequence = scheduled.sequence
        if sequence.max_lookahead > 0 and (
            not sequence.is_decoding or _lag(drafters[sequence.drafter], sequence) >= _MAX_LAG
        ):
            prompts[sequence.drafter].append(scheduled)
        if scheduled.num_draft_tokens > 0 and not scheduled.is_forced:
            guessing[sequence.drafter].append(scheduled)
    for name, group in prompts.items():
        drafters[name].prefill(group)
    for name, group in guessing.items():
        requests = [DraftRequest(s.sequence, s.num_draft_tokens) for s in group]
        drafts = drafters[name].propose(requests, goes_on)
        for scheduled, draft in zip(group, drafts, strict=True):
            assert len(draft.token_ids) <= scheduled.num_draft_tokens
            grammar = scheduled.sequence.grammar
            if grammar is not None:
                draft = draft.first(grammar.num_valid(draft.token_ids))
            scheduled.draft = draft


def _lag(drafter: Drafter, sequence: Sequence) -> int:
    """Committed tokens that the drafter lacks, for it wasn't asked for guesses for a while."""
    return sequence.num_computed - drafter.num_cached(sequence)
