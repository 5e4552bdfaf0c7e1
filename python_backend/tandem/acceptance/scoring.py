"""How likely the verifier finds the tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence as Items

from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence
from tandem.sampling.processors import token_logprobs

# Logits that are made at a time: those of a whole chunk would take gigabytes.
NUM_ROWS = 64


def score_prompts(batch: Items[ScheduledSequence], output: VerifierOutput) -> None:
    """Adds the log probabilities that a pass gives to sequences that ask for their prompt's.

    Args:
        batch: of the step, whose tokens aren't counted as computed yet.
    """
    first = output.num_sampled
    for scheduled in batch:
        sequence, scored = scheduled.sequence, scheduled.scored_rows
        num_top = sequence.params.prompt_logprobs
        if num_top is None:
            continue
        behind = range(sequence.num_computed + scored.start, sequence.num_computed + scored.stop)
        for start in range(0, len(behind), NUM_ROWS):
            part = behind[start : start + NUM_ROWS]
            logits = output.logits(range(first, first + len(part)))
            token_ids = [sequence.token_ids[position + 1] for position in part]
            sequence.prompt_logprobs += token_logprobs(logits, token_ids, num_top)
            first += len(part)
