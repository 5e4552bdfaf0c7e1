"""From the verifier's states to a token at each position of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate, islice

from torch import Tensor

from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence
from tandem.sampling.processors import adjust, is_adjusted
from tandem.sampling.sample import Draw, sample


@dataclass(frozen=True)
class Selection:
    """What one sequence's rows say.

    Attributes:
        token_ids: the verifier's token in each row; -1 where its logits aren't numbers.
        logits: as the verifier made them, `[num_rows, vocab_size]`, if log probabilities are
            asked for.
    """

    token_ids: list[int]
    logits: Tensor | None = None

    @property
    def is_sound(self) -> bool:
        """Whether there are logits that are numbers in all rows."""
        return min(self.token_ids) >= 0


def select(
    output: VerifierOutput, batch: Items[ScheduledSequence], eos_token_ids: frozenset[int]
) -> dict[ScheduledSequence, Selection]:
    """Samples the verifier's token in each row as plain decoding would.

    Args:
        batch: the sequences that yield a token.
    """
    ends = accumulate(s.num_rows for s in batch)
    rows = {s: range(end - s.num_rows, end) for s, end in zip(batch, ends, strict=True)}
    # A greedy request needs the likeliest token alone, which takes far less than all logits.
    greedy: list[ScheduledSequence] = []
    others: list[ScheduledSequence] = []
    for scheduled in batch:
        sequence = scheduled.sequence
        is_plain = sequence.params.is_greedy and not is_adjusted(sequence)
        (greedy if is_plain else others).append(scheduled)
    selections: dict[ScheduledSequence, Selection] = {}
    if greedy:
        token_ids = output.likeliest(_joined(greedy, rows))
        asking = [s for s in greedy if s.sequence.params.logprobs is not None]
        selections |= _split(greedy, token_ids, {s: output.logits(rows[s]) for s in asking})
    if others:
        scores = output.logits(_joined(others, rows))
        selections |= _split(others, *_sample(scores, others, eos_token_ids))
    return selections


def _joined(group: Items[ScheduledSequence], rows: Mapping[ScheduledSequence, range]) -> list[int]:
    return [row for scheduled in group for row in rows[scheduled]]


def _sample(
    scores: Tensor, group: Items[ScheduledSequence], eos_token_ids: frozenset[int]
) -> tuple[list[int], dict[ScheduledSequence, Tensor]]:
    # A NaN or infinity anywhere in a row shows in its largest value.
    finite = scores.amax(dim=-1).isfinite()
    rows = dict(zip(group, scores.split_with_sizes([s.num_rows for s in group]), strict=True))
    raw = {s: rows[s].clone() for s in group if s.sequence.params.logprobs is not None}
    for scheduled in group:
        adjust(rows[scheduled], scheduled.sequence, scheduled.draft_ids, eos_token_ids)
    draws = [
        Draw(s.sequence.params, s.sequence.seed, s.sequence.num_tokens + offset)
        for s in group
        for offset in range(s.num_rows)
    ]
    return sample(scores, draws).where(finite, -1).tolist(), raw


def _split(
    group: Items[ScheduledSequence],
    token_ids: list[int],
    logits: dict[ScheduledSequence, Tensor],
) -> dict[ScheduledSequence, Selection]:
    ids = iter(token_ids)
    return {s: Selection(list(islice(ids, s.num_rows)), logits.get(s)) for s in group}
