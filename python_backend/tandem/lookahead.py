"""How far to draft for one sequence; integers only."""

from __future__ import annotations

from tandem.sequence import Sequence


def lookahead(sequence: Sequence, max_model_len: int) -> int:
    """Draft tokens worth verifying for `sequence` in its next pass.

    A pass yields the accepted drafts and one token more, so drafting as many tokens as the
    sequence may still produce would always waste the last.
    """
    remaining = min(
        sequence.params.max_tokens - sequence.num_output_tokens,
        max_model_len - sequence.num_tokens,
    )
    return max(0, min(sequence.max_lookahead, remaining - 1))
