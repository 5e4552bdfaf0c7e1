"""How likely a draft token is to be accepted, learnt from what became of earlier ones.

A drafter's record is kept by temperature and by position in the round. Where the drafter says how
sure it is of a guess, that counts instead, translated into what such claims have been worth: is a
guess with 0.9 right nine times in ten? A sequence's own luck moves either up or down, the more the
longer it lasts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from tandem.requests.sequence import Sequence

# Observations that the assumption before any counts for, and the share of the old ones that each
# new one leaves.
_PRIOR_WEIGHT = 8.0
_MEMORY = 1 - 1 / 400
_SEQUENCE_WEIGHT = 6.0
_SEQUENCE_MEMORY = 1 - 1 / 24
# Assumed of a drafter that nothing is known of: good enough to be tried.
_FIRST_GUESS = 0.7
# Claims are told apart by the bin that they fall in.
NUM_BINS = 12
_TEMPERATURES = (0.0, 0.5, 0.9, 1.2)


class _Share:
    """A share of successes, of which old ones fade; starts as an assumption."""

    def __init__(self) -> None:
        self._hits = 0.0
        self._trials = 0.0

    def given(self, assumed: float) -> float:
        return (self._hits + _PRIOR_WEIGHT * assumed) / (self._trials + _PRIOR_WEIGHT)

    def add(self, hit: float) -> None:
        self._hits = _MEMORY * self._hits + hit
        self._trials = _MEMORY * self._trials + 1


@dataclass
class _Record:
    """What a drafter's guesses at one temperature have been worth."""

    by_position: defaultdict[int, _Share] = field(default_factory=lambda: defaultdict(_Share))
    # By who made the guess, and how sure it was.
    by_confidence: defaultdict[tuple[str, int], _Share] = field(
        default_factory=lambda: defaultdict(_Share)
    )

    def chances(self, count: int) -> list[float]:
        """By position; one that nothing is known of is taken to be like the one before."""
        chances = [_FIRST_GUESS]
        for position in range(count):
            chances.append(self.by_position[position].given(chances[-1]))
        return chances[1:]

    def worth(self, source: str, confidence: float) -> float:
        """The share accepted of guesses made with about this confidence."""
        bin_ = _bin(confidence)
        return self.by_confidence[source, bin_].given((bin_ + 0.5) / NUM_BINS)


@dataclass
class _Luck:
    """How a sequence does against its drafter's record."""

    surplus: float = 0.0  # accepted drafts, less what the record let expect
    trials: float = 0.0

    @property
    def offset(self) -> float:
        return self.surplus / (self.trials + _SEQUENCE_WEIGHT)

    def add(self, hit: bool, expected: float) -> None:
        self.fade()
        self.surplus += hit - expected
        self.trials += 1

    def fade(self) -> None:
        self.surplus *= _SEQUENCE_MEMORY
        self.trials *= _SEQUENCE_MEMORY


class Estimates:
    """Chances that a draft token is accepted if all before it are."""

    def __init__(self) -> None:
        self._records: defaultdict[tuple[str, int], _Record] = defaultdict(_Record)
        self._luck: defaultdict[int, _Luck] = defaultdict(_Luck)

    def chances(self, sequence: Sequence, count: int) -> list[float]:
        """The chances of guesses not made yet, at the first `count` positions of a round."""
        offset = self._luck[sequence.id].offset
        return [_moved(chance, offset) for chance in self._record(sequence).chances(count)]

    def of(self, sequence: Sequence, source: str, confidence: float) -> float:
        """The chance of a guess that its drafter is `confidence` sure of."""
        worth = self._record(sequence).worth(source, confidence)
        return _moved(worth, self._luck[sequence.id].offset)

    def by_bin(self, sequence: Sequence, source: str) -> list[float]:
        """What `of` says of a confidence in each bin."""
        return [self.of(sequence, source, (bin_ + 0.5) / NUM_BINS) for bin_ in range(NUM_BINS)]

    def observe(
        self,
        sequence: Sequence,
        source: str,
        confidences: list[float],
        num_verified: int,
        num_accepted: int,
    ) -> None:
        """Learns from a round.

        Args:
            confidences: of all guesses that were made, or nothing.
            num_verified: how many of them the verifier saw.
        """
        record, luck = self._record(sequence), self._luck[sequence.id]
        num_tried = min(num_accepted + 1, num_verified)
        for position, expected in enumerate(record.chances(num_tried)):
            hit = position < num_accepted
            if confidences:
                expected = record.worth(source, confidences[position])
                record.by_confidence[source, _bin(confidences[position])].add(hit)
            luck.add(hit, expected)
            record.by_position[position].add(hit)
        if num_tried == num_accepted == num_verified:
            # Guesses that were not worth verifying: left out, the rest would look too good.
            for position in range(num_verified, len(confidences)):
                record.by_position[position].add(record.worth(source, confidences[position]))

    def pause(self, sequence: Sequence) -> None:
        """Lets a sequence's luck fade in a step without drafts, as its text goes on."""
        luck = self._luck.get(sequence.id)
        if luck is not None:
            luck.fade()

    def forget(self, sequence: Sequence) -> None:
        """Drops what is known of a sequence that has ended."""
        self._luck.pop(sequence.id, None)

    def _record(self, sequence: Sequence) -> _Record:
        temperature = sequence.params.temperature
        kind = sum(temperature > bound for bound in _TEMPERATURES)
        return self._records[sequence.drafter, kind]


def _moved(chance: float, offset: float) -> float:
    return min(0.99, max(0.01, chance + offset))


def _bin(confidence: float) -> int:
    return min(NUM_BINS - 1, int(confidence * NUM_BINS))
